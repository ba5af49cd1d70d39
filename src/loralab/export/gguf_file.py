"""Writing a GGUF file from a merged model, tensor by tensor.

Owns the file: its order, its types, what is said of the model. What may be written is `gguf_architectures.py`'s and
`gguf_vocabulary.py`'s; that it says what the model does is proved in `gguf_proof.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.configuration_utils import PreTrainedConfig

from loralab.errors import ModelError
from loralab.export.gguf_architectures import (
    ROPE_FACTORS,
    Architecture,
    Array,
    add_settings,
    lay_out,
    name_tensor,
    rope_factors,
)
from loralab.export.gguf_library import load_gguf
from loralab.export.gguf_vocabulary import Vocabulary, add_vocabulary
from loralab.models.merge_source import Checkpoint

# The file types that are written: numpy's type of matrices, llama.cpp's number of the type.
FILE_TYPES: dict[str, tuple[type[np.floating[Any]], int]] = {"f32": (np.float32, 0), "f16": (np.float16, 1)}


@dataclass(frozen=True, slots=True)
class GgufContent:
    """What goes into a GGUF file besides weights.

    Attributes:
        name: of the model.
        config: of the model.
        architecture: how it is written.
        vocabulary: its tokenizer.
        add_bos: whether whoever reads the file puts the bos token before a prompt.
        add_blank: whether it puts a blank before text (SentencePiece-like).
        chat_template: the Jinja template of the prompt contract, or None.
    """

    name: str
    config: PreTrainedConfig
    architecture: Architecture
    vocabulary: Vocabulary
    add_bos: bool
    add_blank: bool
    chat_template: str | None


def write_gguf(path: Path, weights: Checkpoint, content: GgufContent, *, dtype: str) -> dict[str, Any]:
    """Write a GGUF file; matrices in `dtype`, vectors in float32, as llama.cpp's converter does.

    Args:
        path: of the file.
        weights: the merged model's.
        content: everything else.
        dtype: f16 or f32.

    Returns:
        Numbers of tensors and parameters, and bytes.

    Raises:
        ModelError: a weight does not fit into float16, or has no place in such a file.
    """
    matrix_type, file_type = FILE_TYPES[dtype]
    writer = load_gguf().GGUFWriter(str(path), content.architecture.name)
    writer.add_type("model")
    writer.add_name(content.name)
    writer.add_file_type(file_type)
    add_settings(writer, content.config, content.architecture)
    add_vocabulary(writer, content.vocabulary, add_bos=content.add_bos, add_blank=content.add_blank)
    if content.chat_template is not None:
        writer.add_chat_template(content.chat_template)
    names = _names(weights, content.config)
    factors = rope_factors(content.config)
    parameters = 0
    for own, name in names.items():
        shape = weights.shape(own)
        kind = np.dtype(matrix_type if len(shape) > 1 else np.float32)
        size = int(np.prod(shape))
        parameters += size
        writer.add_tensor_info(name, shape, kind, size * kind.itemsize)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own, name in names.items():
            array = read_array(weights.read(own), name, dtype=dtype)
            writer.write_tensor_data(lay_out(name, array, content.config, content.architecture))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return {"tensors": len(names), "parameters": parameters, "bytes": path.stat().st_size}


def _names(weights: Checkpoint, config: PreTrainedConfig) -> dict[str, str]:
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return {own: name_tensor(own) for own in weights.owners if not (tied and own == "lm_head.weight")}


def read_array(tensor: torch.Tensor, name: str, *, dtype: str) -> Array:
    """Return a tensor in the type that it has in the file.

    Raises:
        ModelError: a value is too large for float16.
    """
    array: Array = tensor.to(torch.float32).numpy()
    matrix_type = FILE_TYPES[dtype][0]
    if array.ndim < 2 or matrix_type is np.float32:
        return array
    if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
        raise ModelError(
            f"{name} has weights beyond float16's largest number, {np.abs(array).max():.3g}",
            where="option --dtype f16",
            fix="give --dtype f32",
        )
    return array.astype(np.float16)

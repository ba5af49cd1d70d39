"""The configuration: every field, declared once with type, default and description.

Owns names, types, defaults and the one-sentence descriptions from which help, the JSON
schema and the reference come. Does not own rules that span sections (`checks.py`) or the
reading of files (`load.py`). No torch here: help and configuration errors must be quick.
"""

from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from loralab.config.output_schema import OutputConfig
from loralab.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section
from loralab.config.training_schema import TrainingConfig


class ModelConfig(Section):
    """The base model and how it is held in memory."""

    name: str = Field(description="Base model: a local folder or a Hub id.", min_length=1)
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub model; null takes the default branch."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Storage and compute type of the frozen weights; auto takes bfloat16 where "
        "the hardware multiplies it, float16 with loss scaling on older CUDA devices, else float32.",
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none",
        description="How the weights of the frozen linear layers are held: none (as they are stored), nf4 or fp4 "
        "(4 bits), or int8; products are those of the dequantized weights.",
    )
    double_quantization: bool = Field(
        True, description="Quantize the scales of nf4 and fp4 too: 4.13 bits per weight instead of 4.5."
    )
    attn_implementation: Literal["auto", "eager", "sdpa"] = Field(
        "auto", description="Attention of the base model; auto takes sdpa where the model has it."
    )
    device: str = Field(
        "auto", description="Where to compute: auto, cpu, cuda, cuda:N or mps.", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"
    )
    device_map: Literal["auto"] | None = Field(
        None,
        description="How one process uses several GPUs: null takes one of them, auto spreads the layers of a base that "
        "is larger than one over all. They compute one after another; training.distributed: fsdp2 uses all at once.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model; only for sources that you trust."
    )
    base_dropout: Literal["off", "as_configured"] = Field(
        "off",
        description="Dropout inside the frozen base while training; off, because noise in frozen "
        "layers slows training and regularises nothing that is trained.",
    )


class DataSource(Section):
    """One of several sources, where it needs settings of its own."""

    path: str = Field(description="A local file, a glob or a Hub id.", min_length=1)
    format: str | None = Field(None, description="Row format of this source; null takes data.format.")
    columns: dict[str, str] | None = Field(
        None, description="Columns of this source, {field: column}; null takes data.columns."
    )
    weight: PositiveFloat = Field(
        1.0,
        le=1000,
        description="Passes over this training source in one epoch: 0.5 takes another half of its rows each epoch, 2 "
        "takes each row twice; at most 1000.",
    )


Names = str | list[str | DataSource]


class ImageConfig(Section):
    """How pictures are found and read."""

    folder: str | None = Field(
        None, description="Folder that the paths of pictures start from; null takes the folder of the data file."
    )
    allow_outside: bool = Field(False, description="Read pictures that lie outside that folder.")
    min_pixels: PositiveInt | None = Field(
        None, description="Smaller pictures are enlarged to this many pixels; null takes the processor's own bound."
    )
    max_pixels: PositiveInt | None = Field(
        None, description="Larger pictures are shrunk to this many pixels; null takes the processor's own bound."
    )
    cache_features: bool | Literal["auto"] = Field(
        "auto",
        description="Keep what a frozen vision tower makes of each picture on disk; auto does where pictures are used "
        "more than once and there is room.",
    )
    cache_gib: PositiveFloat = Field(20.0, description="Most disk space that kept features take, in GiB.")


class DataConfig(Section):
    """Where rows come from and how they become tokens."""

    train: Names = Field(
        description="Training data: a local file, a glob, a Hub id (OWNER/NAME[:CONFIG][@REVISION][#SPLIT]) or a list "
        "of these and of {path, format, columns, weight}."
    )
    validation: Names | float | int | None = Field(
        None,
        description="Validation data: a file, the name of a split, a fraction below 1 or a number of training rows; "
        "null for none.",
    )
    test: Names | float | int | None = Field(
        None, description="Test data, in the same forms as validation; never seen in training."
    )
    split_method: Literal["random", "first"] = Field(
        "random", description="Which rows a fraction or number takes: random (by split_seed) or the first ones."
    )
    split_seed: NonNegativeInt = Field(42, description="Seed of the random split; part of the data fingerprint.")
    format: str = Field(
        "auto",
        description="Row format: auto (told by the columns), messages, sharegpt, alpaca, prompt_completion, "
        "conversational_prompt_completion, yes_no, question_answer, vqa, segments, tokenized or text.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column of your data for each field of the format: {field: column}."
    )
    template: str = Field(
        "auto",
        description="Prompt template: auto, tokenizer (its own), alpaca, chatml, gemma, llama3, mistral, phi3, qwen, "
        "vicuna, zephyr, none, or the path of a Jinja file.",
    )
    template_kwargs: dict[str, object] = Field(
        default_factory=dict,
        description="Variables for the template, such as {enable_thinking: false}; they become part of the adapter's.",
    )
    system: str | None = Field(
        None,
        description="System message put before conversations that have none; part of the prompt contract.",
        min_length=1,
    )
    stop_tokens: list[str] | None = Field(
        None,
        description="Tokens that end an answer, most important first; null takes what the template writes "
        "after an answer, else the tokenizer's end token.",
    )
    train_on: Literal["response", "last_response", "all"] | list[Literal["system", "user", "assistant", "tool"]] = (
        Field(
            "response",
            description="Which tokens carry loss: every answer (response), last_response, all, or the turns of the "
            "roles in a list ([system, user, assistant, tool] or some of them); text is always all.",
        )
    )
    max_length: PositiveInt = Field(512, description="Longest example, in tokens, prompt and answer together.")
    truncation: Literal["right", "left", "drop", "error"] = Field(
        "right",
        description="What happens to a longer example: its answer is cut (right), its oldest turns but the system "
        "message are left out (left), it is dropped, or the run stops (error).",
    )
    long_text: Literal["split", "truncate"] = Field(
        "split", description="Text longer than max_length: split into windows that predict every token once, or cut."
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="A row that its format or the template cannot use: stop, or drop and count it."
    )
    max_dropped_fraction: Fraction = Field(
        0.05, description="Largest share of rows that may be dropped, 0 to 1; more stops the run."
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="How pictures are found and read.")
    num_workers: NonNegativeInt | Literal["auto"] = Field(
        "auto",
        description="Processes that tokenize, and that decode pictures while a model trains; 0 works in the main "
        "process, auto goes by rows, cores and device.",
    )
    cache_dir: str | None = Field(
        None, description="Folder of tokenized data, keyed by content; null takes the user's cache folder."
    )


class LoraConfig(Section):
    """The adapter."""

    variant: Literal[
        "lora", "rslora", "dora", "lora_plus", "pissa", "olora", "eva", "loftq", "vera", "loha", "lokr", "ia3"
    ] = Field("lora", description="Kind of adapter.")
    r: Annotated[int, Field(gt=0, le=65_536)] = Field(8, description="Rank of the update matrices.")
    alpha: PositiveFloat = Field(
        16.0, description="Scale: the update is multiplied by alpha / r (rslora: alpha / sqrt(r))."
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] = Field(
        16.0, description="Learning rate of every B in lora_plus, as a multiple of training.learning_rate; 1 or more."
    )
    eva_rho: Annotated[float, Field(ge=1.0)] = Field(
        2.0,
        description="How far eva may raise a layer's rank, as a multiple of r, where others shrink; 1 keeps all at r.",
    )
    eva_rows: PositiveInt = Field(
        256, description="Training rows whose activations eva computes its first weights from, drawn by training.seed."
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Dropout probability at the adapter's input, 0 to below 1."
    )
    target_modules: str | list[str] = Field(
        "auto",
        description="Layers that get an adapter: auto or all-linear (all linear layers but the head), attention, a "
        "list of names, or a regular expression for whole layer names.",
    )
    vision: Literal["none", "projector", "all"] = Field(
        "none",
        description="Which layers that read pictures get an adapter too: none, those between vision tower and language "
        "model (projector), or those of the tower as well (all).",
    )
    layers_to_transform: list[StrictInt] | None = Field(
        None,
        description="Numbers of the decoder layers that get an adapter, from 0, or from the end: [-2, -1] are the top "
        "two; null takes all.",
    )
    rank_pattern: dict[str, PositiveInt] | None = Field(
        None, description="Another r for some layers, {name or regular expression: r}; the first match counts."
    )
    alpha_pattern: dict[str, PositiveFloat] | None = Field(
        None, description="Another alpha for some layers, {name or regular expression: alpha}; the first match counts."
    )
    modules_to_save: list[str] | None = Field(
        None,
        description="Layers that are trained whole and saved with the adapter, by name: norms, embed_tokens, lm_head.",
    )
    trainable_token_indices: list[StrictInt | StrictStr] | None = Field(
        None,
        description="Tokens whose rows of the embedding are trained, by id or by text, such as [151643, <|sep|>]; a "
        "text that is no token yet is added to the tokenizer, to the embedding and to the head.",
    )


class EvaluationConfig(Section):
    """What is measured, when, and on what."""

    strategy: Literal["epoch", "steps", "no"] = Field(
        "epoch", description="When the validation loss is measured while training."
    )
    steps: PositiveInt = Field(100, description="Steps between two evaluations when strategy is steps.")
    batch_size: PositiveInt = Field(8, description="Rows per evaluation batch.")
    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="Split of the final evaluation; auto takes test, else validation."
    )
    metrics: list[str] | Literal["auto"] = Field(
        "auto",
        description="What is measured besides the loss: perplexity, token_accuracy, token_entropy, exact_match, "
        "yes_no, label_accuracy, calibration, number, rouge, bleu, chrf, stop_rate, length, repetition, or a "
        "function of your own, package.module:function; auto takes yes_no for such rows and what training watches.",
    )
    answer_by: Literal["auto", "generate", "score", "teacher_forced"] = Field(
        "auto",
        description="How answers come about: generate, score (the most likely of labels) or teacher_forced (each token "
        "behind the right ones, which flatters); auto scores where labels are set or rows are yes_no, else generates.",
    )
    labels: list[str] | None = Field(
        None, description="Closed answers that are scored, such as [yes, no]; null takes those that the data has."
    )
    group_by: str | None = Field(
        None,
        description="Column of the rows whose values group the metrics of answers in the final evaluation; answer_type "
        "where there is no such column: yes/no, number or other, by the reference.",
        min_length=1,
    )
    metric_rows: PositiveInt = Field(
        200,
        description="Validation rows that are answered in each evaluation while training, spread evenly; the final "
        "evaluation takes the whole split.",
    )
    num_samples: NonNegativeInt = Field(
        4, description="Prompts of that split that base and adapter answer at the end, for the report."
    )
    max_new_tokens: PositiveInt = Field(128, description="Longest generated answer, in tokens.")
    bootstrap_samples: PositiveInt = Field(
        2000, description="Resamples behind the confidence interval of the difference."
    )


class AdvancedConfig(Section):
    """Rarely needed."""

    trainer_args: dict[str, object] = Field(
        default_factory=dict,
        description="Further transformers.TrainingArguments by name, from an allow-list.",
    )


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(description="The base model.")
    data: DataConfig = Field(description="The data.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="The adapter.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="The optimizer's steps.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="What is measured.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="The run folder.")
    advanced: AdvancedConfig = Field(default_factory=AdvancedConfig, description="Rarely needed.")

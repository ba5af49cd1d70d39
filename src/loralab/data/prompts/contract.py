"""The prompt contract: what an adapter was prompted with in training, and the check that it still is.

Owns `prompt_contract.json`: its content, its check and the wording of a difference. Every command
that prompts an adapter goes through `load_contracted`.
"""

import copy
import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from loralab.data.example import Message
from loralab.data.prompts.prompter import Prompter
from loralab.errors import PromptContractError

CONTRACT_FILE = "prompt_contract.json"
CONTRACT_VERSION = 2
_GOLDEN_PROMPTS = ("What is the capital of France?", "Sort these: 3, 1, 2.", "Grüße, 世界! 👋\n\nSecond line.")
_LIBRARIES = ("loralab", "transformers", "tokenizers", "jinja2")
_SERIALISERS = ("transformers", "tokenizers")
_NEEDED = ("template", "stop_tokens", "stop_token_ids", "golden")
_SPECIAL = ("bos_token", "eos_token")
# Characters shown on either side of the first difference, and of ids around it.
_AROUND, _AROUND_IDS = 24, 4


def build_contract(prompter: Prompter) -> dict[str, Any]:
    """Return the contract: template, special-token policy, system prompt, stop tokens, golden prompts, versions."""
    template = str(prompter.tokenizer.chat_template)
    return {
        "version": CONTRACT_VERSION,
        "template": template,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "special_tokens": {
            "policy": "written by the template alone (add_special_tokens=False)",
            **{name: getattr(prompter.tokenizer, name) for name in _SPECIAL},
        },
        "tokenizer": _describe_tokenizer(prompter.tokenizer),
        "system_prompt": prompter.system_prompt,
        "stop_token_ids": list(prompter.stop.ids),
        "stop_tokens": list(prompter.stop.texts),
        "golden": [{"prompt": text, "ids": _golden_ids(prompter, text)} for text in _GOLDEN_PROMPTS],
        **({} if prompter.pictures is None else {"pictures": prompter.pictures.promise()}),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return size and hash of a tokenizer's vocabulary and rules, or None where a class of its own holds them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if backend.padding is not None or backend.truncation is not None:  # how it was called last, not what it is
        backend = copy.deepcopy(backend)
        backend.no_padding()
        backend.no_truncation()
    return {"tokens": len(tokenizer), "sha256": hashlib.sha256(backend.to_str().encode()).hexdigest()}


def _golden_ids(prompter: Prompter, text: str) -> list[int]:
    system = [] if prompter.system_prompt is None else [Message("system", prompter.system_prompt)]
    return prompter.encode_prompt([*system, Message("user", text)])


def check_contract(prompter: Prompter, contract: Mapping[str, Any], *, where: str) -> None:
    """Check that a prompter sends what a contract's golden prompts promise.

    Args:
        prompter: with the contract's system prompt.
        contract: as `build_contract` made it, of this version or an older one.
        where: the contract's file, for messages.

    Raises:
        PromptContractError: template, special tokens, stop tokens, golden ids or tokenizer differ.
    """
    template = str(prompter.tokenizer.chat_template)
    if template != contract.get("template"):
        _break(_template_difference(template, str(contract.get("template"))), where)
    _check_special(prompter, contract.get("special_tokens"), where)
    if list(prompter.stop.ids) != contract.get("stop_token_ids"):
        trained, now = contract.get("stop_token_ids"), list(prompter.stop.ids)
        _break(_two_sides("the stop tokens' ids differ", str(trained), str(now)), where)
    golden = contract.get("golden")
    for entry in golden if isinstance(golden, list) else [None]:
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            _break(f"a golden prompt is damaged: {str(entry)[:60]}", where)
        ids = _golden_ids(prompter, entry["prompt"])
        if ids != entry.get("ids"):
            _break(_golden_difference(prompter, entry["prompt"], ids, entry.get("ids")), where)
    _check_tokenizer(prompter.tokenizer, contract, where)


def check_pictures(prompter: Prompter, contract: Mapping[str, Any], *, where: str) -> None:
    """Check that pictures become the tokens and pixels that a contract promises; nothing for a model of text.

    Args:
        prompter: with the processor that will be used.
        contract: as `build_contract` made it.
        where: the contract's file, for messages.

    Raises:
        PromptContractError: they do not.
    """
    trained = contract.get("pictures")
    if prompter.pictures is None or trained is None:  # without a processor a prompt with a picture is refused
        return
    if not isinstance(trained, Mapping):
        _break(f"what it says of pictures is damaged: {str(trained)[:60]}", where)
    now = prompter.pictures.promise()
    # Another version may write the same settings in other words.
    same = trained.get("transformers") == now["transformers"]
    for name, value in now.items():
        if name == "transformers" or (name == "sha256" and not same):
            continue
        if trained.get(name) != value:
            _break(_two_sides(f"pictures: {name} differs", str(trained.get(name))[:80], str(value)[:80]), where)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, contract: Mapping[str, Any], where: str) -> None:
    """Check what the golden prompts do not show, such as a token that was added since."""
    trained, versions = contract.get("tokenizer"), contract.get("versions")
    same = isinstance(versions, Mapping) and all(versions.get(name) == _versions()[name] for name in _SERIALISERS)
    if trained is None or not same:  # other versions of these libraries may write the same rules in other words
        return
    now = _describe_tokenizer(tokenizer)
    if trained != now:
        _break(_two_sides("the tokenizer's vocabulary or rules differ", str(trained)[:80], str(now)[:80]), where)


def _check_special(prompter: Prompter, trained: object, where: str) -> None:
    if not isinstance(trained, Mapping):  # version 1 had a sentence here
        return
    for name in _SPECIAL:
        now = getattr(prompter.tokenizer, name)
        if name in trained and now != trained[name]:
            _break(_two_sides(f"the tokenizer's {name} differs", repr(trained[name]), repr(now)), where)


def load_contracted(tokenizer: PreTrainedTokenizerBase, contract: Mapping[str, Any], *, where: str) -> Prompter:
    """Return the prompter of an adapter's tokenizer, checked against the adapter's contract.

    Raises:
        PromptContractError: the contract is damaged or of a later version, or the tokenizer does not keep it.
    """
    _check_whole(contract, where)
    if not isinstance(tokenizer.chat_template, str):
        _break("the tokenizer's chat template is missing", where)
    if tokenizer.chat_template != contract["template"]:  # before it is rendered: a damaged one may not render
        _break(_template_difference(tokenizer.chat_template, contract["template"]), where)
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in contract["stop_tokens"] if not isinstance(token, str) or token not in vocabulary]
    if unknown:
        _break(f"the tokenizer has no {unknown[0]!r}", where)
    prompter = Prompter(tokenizer, contract["stop_tokens"], system_prompt=contract.get("system_prompt"))
    check_contract(prompter, contract, where=where)
    return prompter


def _check_whole(contract: Mapping[str, Any], where: str) -> None:
    """Refuse a contract that is damaged, before anything is held against it."""
    version, special, system = (contract.get(key) for key in ("version", "special_tokens", "system_prompt"))
    if isinstance(version, int) and version > CONTRACT_VERSION:
        raise PromptContractError(
            f"the prompt contract is of version {version}, and this loralab knows them up to {CONTRACT_VERSION}",
            where=where,
            fix="install the loralab that wrote it, or a later one",
        )
    missing = [key for key in _NEEDED if not contract.get(key)]
    if missing:
        _break(f"the contract has no {', '.join(missing)}", where)
    if not isinstance(contract["stop_tokens"], list) or not isinstance(contract["template"], str):
        _break("the contract's template or stop_tokens are no text and list", where)
    digest = hashlib.sha256(contract["template"].encode("utf-8", "replace")).hexdigest()
    if contract.get("template_sha256") != digest:
        _break("the contract's template is not the one whose hash it holds", where)
    if not isinstance(version, int) or version < 1:
        _break(f"the contract's version is {str(version)[:60]!r}, not a number from 1", where)
    if version > 1 and not (isinstance(special, dict) and all(name in special for name in _SPECIAL)):
        _break(f"the contract's special_tokens are damaged: {str(special)[:60]!r}", where)
    if not isinstance(system, str | None):
        _break(f"the contract's system_prompt is {type(system).__name__}, not text", where)


def _break(what: str, where: str) -> NoReturn:
    raise PromptContractError(
        f"prompt contract broken: {what}",
        where=where,
        fix="restore the adapter folder's tokenizer files, or train again with the new template",
    )


def _two_sides(what: str, trained: str, now: str) -> str:
    return f"{what}: trained with {trained}, now {now}"


def _template_difference(now: str, trained: str) -> str:
    at = _first_difference(now, trained)
    line, column = trained.count("\n", 0, at) + 1, at - (trained.rfind("\n", 0, at) + 1) + 1
    return _two_sides(
        f"the template differs at character {at + 1} (line {line} column {column})",
        _around(trained, at),
        _around(now, at),
    )


def _around(text: str, at: int) -> str:
    start, end = max(at - _AROUND, 0), at + _AROUND
    return f"{'...' if start else ''}{text[start:end]!r}{'...' if end < len(text) else ''}"


def _golden_difference(prompter: Prompter, prompt: str, now: list[int], trained: object) -> str:
    what = f"the golden prompt {prompt!r} gives other token ids"
    if not isinstance(trained, list) or not all(isinstance(token, int) for token in trained):
        return _two_sides(what, str(trained)[:80], str(now)[:80])
    at = _first_difference(now, trained)
    trained_ids, now_ids = (_ids_around(prompter, ids, at) for ids in (trained, now))
    return _two_sides(f"{what}, from token {at + 1}", trained_ids, now_ids)


def _ids_around(prompter: Prompter, ids: list[int], at: int) -> str:
    start, end = max(at - _AROUND_IDS, 0), at + _AROUND_IDS
    shown = ids[start:end]
    known = [token for token in shown if 0 <= token < len(prompter.tokenizer)]
    return f"{'...' if start else ''}{shown}{'...' if end < len(ids) else ''} {prompter.tokenizer.decode(known)!r}"


def _first_difference(now: "str | list[int]", trained: "str | list[int]") -> int:
    pairs = zip(now, trained, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(now), len(trained)))

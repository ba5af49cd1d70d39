"""The frozen layers below the lowest adapter: which they are, and running a model without them.

Owns modules that stand in a model's list of layers for the time of one forward: the model's own code runs
on, with its masks, positions and checkpointing, and starts at the first layer that is trained. What the frozen
layers give is kept by `trunk_store.py`; whether a model can be cut like that is measured by the workflow.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loralab.errors import StorageError
from loralab.models.trunk_store import TrunkStore


class UncuttableModel(Exception):
    """A model that cannot start behind its frozen layers; the text says why."""


def find_trunk(body: nn.Module, *, layers: int) -> "FrozenTrunk":
    """Return the layers of a model, cut where the lowest adapter sits.

    Args:
        body: the part of the model that holds the layers.
        layers: how many layers its configuration names.

    Raises:
        UncuttableModel: no list of that many layers was found.
    """
    found = [each for each in body.modules() if isinstance(each, nn.ModuleList) and len(each) == layers]
    if len(found) != 1:
        raise UncuttableModel(f"the model has {len(found)} lists of {layers} layers, where one was expected")
    # A frozen adapter counts too: the base is evaluated without it.
    adapted = (
        place
        for place, layer in enumerate(found[0])
        if any(isinstance(module, BaseTunerLayer) for module in layer.modules())
        or any(weight.requires_grad for weight in layer.parameters())
    )
    return FrozenTrunk(found[0], next(adapted, layers))


class FrozenTrunk:
    """A model's layers, and the first of them that is not frozen.

    Args:
        layers: the model's own list.
        first: index of the lowest layer with an adapter.
    """

    def __init__(self, layers: nn.ModuleList, first: int) -> None:
        self.layers = layers
        self.first = first
        self._entries: int | None = None  # of the tuple that a layer returns; None where it returns a tensor

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Look at what the layers take and return in a forward that runs meanwhile, with gradients.

        Raises:
            UncuttableModel: more than hidden states goes from layer to layer, or something below is trained.
        """
        observers = [_Observer(layer) for layer in self.layers]
        with self._standing_in(dict(enumerate(observers))):
            yield
        forms = {observer.entries for observer in observers}
        if len(forms) != 1 or -1 in forms:
            raise UncuttableModel(
                "its layers pass on more than one tensor of hidden states, or are not called in order"
            )
        if self.first < len(observers) and observers[self.first].trained_below:
            raise UncuttableModel("weights are trained in front of the layers, as those of an embedding")
        self._entries = forms.pop()

    @contextmanager
    def computing(self) -> Iterator["Recorder"]:
        """Let a forward that runs meanwhile end below the first trained layer.

        Yields:
            What holds the hidden states that would enter that layer, once the forward has run.
        """
        recorder = Recorder()
        above = range(self.first, len(self.layers))
        passing = {place: _StandIn(self.layers[place], entries=self._entries) for place in above}
        passing[self.first] = _StandIn(self.layers[self.first], entries=self._entries, recorder=recorder)
        with self._standing_in(passing):
            yield recorder

    @contextmanager
    def starting_at(self, states: Tensor) -> Iterator[None]:
        """Let a forward that runs meanwhile start at the first trained layer.

        Args:
            states: hidden states that enter that layer (R, L, D).
        """
        below = {place: _StandIn(self.layers[place], entries=self._entries) for place in range(1, self.first)}
        below[0] = _StandIn(self.layers[0], entries=self._entries, states=states)
        with self._standing_in(below):
            yield

    @contextmanager
    def _standing_in(self, modules: Mapping[int, nn.Module]) -> Iterator[None]:
        own = {place: self.layers[place] for place in modules}
        try:
            for place, module in modules.items():
                self.layers[place] = module
            yield
        finally:
            for place, module in own.items():
                self.layers[place] = module


@dataclass(slots=True)
class Recorder:
    """What entered the first trained layer.

    Attributes:
        states: hidden states (R, L, D), or None where that layer was not called.
    """

    states: Tensor | None = None


class _Substitute(nn.Module):
    """A module in the place of a layer, whose attributes a model may still ask for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is no child: its weights are not to be found twice.
        self._layer = (layer,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


class _StandIn(_Substitute):
    """Passes hidden states on, or gives those that were stored."""

    def __init__(
        self,
        layer: nn.Module,
        *,
        entries: int | None,
        states: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(layer)
        self._entries, self._states, self._recorder = entries, states, recorder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._states is not None:
            if states.shape != self._states.shape:
                raise UncuttableModel(f"hidden states of shape {tuple(states.shape)} enter the first layer")
            states = self._states
        if self._recorder is not None:
            self._recorder.states = states.detach()
        return states if self._entries is None else (states, *[None] * (self._entries - 1))


class _Observer(_Substitute):
    """Runs the layer and notes what it returns.

    Attributes:
        entries: of the returned tuple, None for a tensor; -1 where more than hidden states came back,
            or nothing did.
        trained_below: whether what enters the layer has a gradient.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.entries: int | None = -1
        self.trained_below = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entering = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        self.trained_below |= any(each.requires_grad for each in entering)
        result = self._layer[0](*args, **kwargs)
        if isinstance(result, Tensor):
            self.entries = None if result.ndim == 3 else -1
        elif isinstance(result, tuple) and isinstance(result[0], Tensor) and result[0].ndim == 3:
            self.entries = len(result) if all(each is None for each in result[1:]) else -1
        return result


class CachedTrunk:
    """A frozen trunk with what it gave for the token paths of a run.

    Args:
        trunk: the layers.
        store: hidden states by path.

    Attributes:
        hits: forwards that started behind the frozen layers.
        misses: forwards that ran them, because a path was not stored.
    """

    def __init__(self, trunk: FrozenTrunk, store: TrunkStore) -> None:
        self.trunk = trunk
        self.store = store
        self.hits = self.misses = 0

    @contextmanager
    def serving(self, prefixes: Tensor, mask: Tensor) -> Iterator[None]:
        """Let the forward that runs meanwhile start behind the frozen layers, if all its paths are stored.

        Args:
            prefixes: a hash of all token ids up to each token (R, L).
            mask: one where there is a token (R, L).
        """
        states = self.find(prefixes, mask)
        if states is None:
            self.misses += 1
            yield
            return
        self.hits += 1
        with self.trunk.starting_at(states):
            yield

    def find(self, prefixes: Tensor, mask: Tensor) -> Tensor | None:
        """Return the stored hidden states (R, L, D), zero behind a row's end; None where a path is not stored."""
        real = mask.bool().cpu()
        rows = self.store.find(prefixes.cpu()[real].numpy())
        if rows is None:
            return None
        try:
            found = self.store.read(rows)
        except OSError as error:
            raise StorageError(
                f"what was kept of the frozen layers cannot be read: {error}",
                where=str(self.store.folder),
                fix="leave the folder alone while the run is under way; --resume computes it anew",
            ) from error
        states = torch.zeros((*real.shape, found.shape[-1]), dtype=found.dtype)
        states[real] = found
        return states.to(prefixes.device)

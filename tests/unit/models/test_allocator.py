"""The model of the heap: what stays with a process after tensors went."""

import pytest

from loralab.models import allocator
from loralab.models.allocator import MAPPED_BYTES, heap_peak, returning_memory

MIB = 1 << 20
Events = list[tuple[int, int]]


def coming_and_going(*sizes: int) -> Events:
    """Return tensors of which each goes before the next comes."""
    return [event for number, size in enumerate(sizes) for event in ((number, size), (number, -1))]


def test_peak_is_no_less_than_what_is_alive_at_once() -> None:
    events = [(0, 3 * MIB), (1, 5 * MIB), (0, -1), (2, MIB), (1, -1), (2, -1)]
    assert 8 * MIB <= heap_peak([events]) < 8.1 * MIB


def test_room_of_a_tensor_is_used_again_by_smaller_ones() -> None:
    assert heap_peak([coming_and_going(8 * MIB, 4 * MIB, 2 * MIB)]) < 8.1 * MIB


def test_what_is_left_goes_before_the_next_computation() -> None:
    once = [(0, 4 * MIB)]
    assert heap_peak([once] * 5) < 2 * heap_peak([once])


def test_large_tensors_are_given_back() -> None:
    """Each is larger than the one before, so none fits where another was; on the heap they would add up."""
    growing = [MAPPED_BYTES + n * MIB for n in range(8)]
    assert heap_peak([coming_and_going(*growing)]) < growing[-1] + MIB


def test_heap_grows_where_tensors_live_in_turns() -> None:
    """Every other tensor stays: its neighbours leave room that something larger cannot use."""
    stays = [(number, MIB) for number in range(40)]
    goes = [(number, -1) for number in range(0, 40, 2)]
    larger = [(number, 3 * MIB // 2) for number in range(40, 50)]
    alive = 40 * MIB - 20 * MIB + 15 * MIB
    assert heap_peak([[*stays, *goes, *larger]]) > 1.3 * alive


def test_same_events_give_the_same_number() -> None:
    events = [(n, (n % 7 + 1) * MIB) for n in range(50)] + [(n, -1) for n in range(50)]
    assert heap_peak([events, events]) == heap_peak([events, events])


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    with returning_memory():
        pass
    assert not allocator.keeps_freed_memory()


def test_thresholds_are_set_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            calls.append(("mallopt", name, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            calls.append(("malloc_trim", pad, 0))
            return 1

    monkeypatch.setattr(allocator, "_glibc", Library)

    def fail() -> None:
        with returning_memory():
            raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        fail()
    assert calls[0] == ("mallopt", -3, 1 << 20)
    assert ("mallopt", -3, MAPPED_BYTES) in calls
    assert calls[-1] == ("malloc_trim", 0, 0)

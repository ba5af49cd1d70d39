"""Pictures in rows: each feature at its place on every path, each picture once where it is shared."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch, PictureBatch
from loralab.layout.grouping import find_prefix_groups
from loralab.layout.paths import token_positions
from loralab.layout.planner import Planner
from loralab.layout.tree import PackedRow, Tree, build_leaves, lay_out, shared_length, take_apart
from support.layouts import ALWAYS_SHARE
from unit.layout.examples import planners
from unit.layout.pictures import (
    TOKEN,
    NumberedReader,
    axes_of,
    expected_features,
    features_of,
    picture,
    shown_example,
    shown_forests,
    shown_trees,
)

EXAMPLES = shown_forests()
ALL = 1_000_000


def path_to(ends: Sequence[int], last: int) -> list[int]:
    return [k for k in range(last + 1) if last < ends[k]]


def features_in(row: PackedRow) -> dict[int, tuple[str, int]]:
    """Return for each position of a row that takes a feature: whose, and which of it; none takes two."""
    found: dict[int, tuple[str, int]] = {}
    for shown in row.pictures:
        for number, position in enumerate(shown.positions.tolist()):
            assert position not in found
            found[position] = (shown.file.sha256, number)
    return found


@given(data=st.data(), examples=EXAMPLES)
def test_every_path_has_its_features_and_positions(data: st.DataObject, examples: list[TokenizedExample]) -> None:
    axes = axes_of(examples)
    row = lay_out(data.draw(shown_trees(examples)), axes=axes, picture_token=TOKEN)
    features, ends = features_in(row), row.subtree_end.tolist()
    assert set(features) == set(np.flatnonzero(row.input_ids == TOKEN).tolist())
    found = take_apart(row)
    assert len(found) == sum(len(example.branches) for example in examples)
    for (number, place), taken in found.items():
        branch = examples[number].branches[place]
        np.testing.assert_array_equal(taken.prompt_ids, branch.prompt_ids)
        np.testing.assert_array_equal(taken.answer_ids, branch.answer_ids)
        mine = (row.label_examples == number) & (row.label_branches == place)
        path = path_to(ends, int(row.label_positions[mine][-1]))
        assert {i: features[p] for i, p in enumerate(path) if p in features} == expected_features(branch)
        np.testing.assert_array_equal(row.position_ids[:, path], token_positions(len(path), branch.images, axes=axes))


@given(data=st.data(), examples=EXAMPLES)
def test_prefix_hashes_tell_pictures_apart(data: st.DataObject, examples: list[TokenizedExample]) -> None:
    """Equal where the same tokens and pictures lead, different where others do: what dropout is keyed by."""
    row = lay_out(data.draw(shown_trees(examples)), axes=1, picture_token=TOKEN)
    features, ends = features_in(row), row.subtree_end.tolist()
    known: dict[tuple, int] = {}
    for query in range(len(row)):
        path = tuple(features.get(k, int(row.input_ids[k])) for k in path_to(ends, query))
        if row.input_ids[query] == TOKEN or 8 not in row.input_ids:
            assert known.setdefault(path, int(row.token_prefixes[query])) == int(row.token_prefixes[query])
    assert len(set(known.values())) == len(known)


def test_a_shared_picture_stands_once() -> None:
    examples = [
        shown_example(([1, (2,), 3], [4, 5])),
        shown_example(([1, (2,), 6], [4])),
        shown_example(([1, (2,), 3, 7], [8])),
    ]
    leaves = sorted(build_leaves(examples), key=lambda leaf: leaf.sort_key)
    shared = [0, *(shared_length(a, b) for a, b in itertools.pairwise(leaves))]
    row = lay_out([Tree(leaves, shared)], axes=3, picture_token=TOKEN)
    assert [shown.file for shown in row.pictures] == [picture(2)]
    assert row.pictures[0].positions.tolist() == [1, 2, 3, 4]
    assert (row.input_ids == TOKEN).sum() == 4


def test_pictures_of_one_size_are_never_shared() -> None:
    one, other, same = build_leaves([shown_example(([1, (n,), 3], [4])) for n in (0, 1, 0)])
    assert one.ids.tolist() == other.ids.tolist()
    assert (shared_length(one, other), shared_length(one, same)) == (1, len(one))
    step = Planner(ALL, cost=ALWAYS_SHARE, pictures=NumberedReader())(
        [shown_example(([1, (n,), 3], [4])) for n in (0, 1, 0)]
    )
    (batch,) = step.micro_batches
    assert batch.tokens == 1 + 2 * (features_of(0) + 1)
    assert batch.pictures is not None
    assert batch.pictures.counts == (2, 2)


def test_text_around_pictures_is_laid_out_without_a_reader() -> None:
    (leaf,) = build_leaves([shown_example(([1, (0,), 3], [4]))])
    row = lay_out([Tree([leaf], [0])])
    assert (row.pictures, row.position_ids.shape) == ((), (1, 4))
    (batch,) = Planner(ALL)([shown_example(([1, (0,), 3], [4]))]).micro_batches
    assert batch.pictures is None


def put_in(batch: MicroBatch) -> torch.Tensor:
    """Return what stands at each position (R, L, 2): picture and number of its feature, or the token, and -1."""
    cells = torch.stack([batch.input_ids, torch.full_like(batch.input_ids, -1)], dim=-1)
    if batch.pictures is not None:
        flat = cells.view(-1, 2)
        assert len(batch.pictures.positions.unique()) == len(batch.pictures.positions)
        flat[batch.pictures.positions] = batch.pictures.tensors["features"][batch.pictures.features]
    return cells


@given(examples=EXAMPLES, planner=planners())
def test_however_a_step_is_cut_every_label_sees_its_pictures(
    examples: list[TokenizedExample], planner: Planner
) -> None:
    axes = axes_of(examples)
    reader = NumberedReader(axes=axes)
    step = replace(planner, pictures=reader)(examples)
    number_of = {picture(n).sha256: n for n in range(4)}
    # What is asked of a model: all that a label is predicted from, pictures by their numbers, and the label.
    wanted = []
    for index, example in enumerate(examples):
        for branch in example.branches:
            ids = [*branch.prompt_ids.tolist(), *branch.answer_ids.tolist()]
            cells = [(token, -1) for token in ids]
            for place, (sha, k) in expected_features(branch).items():
                cells[place] = (number_of[sha], k)
            positions = token_positions(len(ids), branch.images, axes=axes)
            for n in range(len(branch.prompt_ids), len(ids)):
                wanted.append((index, ids[n], tuple(cells[:n]), tuple(map(tuple, positions[:, :n].T.tolist()))))
    found = []
    for batch in step.micro_batches:
        cells, width = put_in(batch), batch.input_ids.shape[1]
        assert batch.position_ids.shape[0] == axes
        triples = zip(batch.label_positions.tolist(), batch.labels.tolist(), batch.label_examples.tolist(), strict=True)
        for position, label, owner in triples:
            row, column = divmod(position, width)
            path = path_to(batch.subtree_end[row].tolist(), column)
            seen = tuple(map(tuple, cells[row, path].tolist()))
            found.append((owner, label, seen, tuple(map(tuple, batch.position_ids[:, row, path].T.tolist()))))
    assert sorted(found) == sorted(wanted)
    for files in reader.asked:
        assert len(files) == len(set(files))  # each once in a micro-batch, however often it stands there


def test_a_batch_of_pictures_by_hand() -> None:
    examples = [shown_example(([1, (2,), 3], [4])), shown_example(([(0,), 5, (2,)], [6]))]
    (batch,) = Planner(ALL, layout="padded", pictures=NumberedReader())(examples).micro_batches
    pictures = batch.pictures
    assert isinstance(pictures, PictureBatch)
    assert batch.input_ids.tolist() == [[9, 9, 5, 9, 9, 9, 9], [1, 9, 9, 9, 9, 3, 0]]
    assert pictures.counts == (2, 4)
    assert pictures.keys == tuple(int(picture(n).sha256[:15], 16) for n in (0, 2))
    assert pictures.positions.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert pictures.features.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    moved = batch.to(torch.device("meta")).pictures
    assert moved is not None
    assert {t.device.type for t in (moved.positions, moved.features, *moved.tensors.values())} == {"meta"}
    assert (moved.counts, moved.keys) == (pictures.counts, pictures.keys)


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_about_one_picture_are_found(seed: int) -> None:
    """The pictures are of one size: their token ids are the same."""
    draw = np.random.default_rng(seed)
    owners = draw.permutation(np.repeat(np.arange(5), 4)).tolist()
    # 16 pictures of two features each: a beginning of 32 tokens that only keys tell apart.
    prompts = [[*[(4 * owner,)] * 16, *draw.integers(0, 8, 5).tolist()] for owner in owners]
    groups = find_prefix_groups([shown_example((prompt, [1])) for prompt in prompts], largest=4)
    assert {frozenset(group) for group in groups} == {
        frozenset(i for i, o in enumerate(owners) if o == owner) for owner in range(5)
    }

"""Batch: the packed row against numbers written by hand; every pair dealt out exactly once over ranks and forwards."""

import itertools
import math
import random

import pytest
import torch

import train_with_preference_prompt as T

# --- one packed row
#
# pair 0: prompt 11 12 13, chosen 21 22, rejected 31 32 33     pair 1: prompt 14, chosen 23, rejected 34 35
# pair 2: prompt 15 16, chosen 24, rejected 36                 An answer's last token is predicted and never read.
TRIPLES = [([11, 12, 13], [21, 22], [31, 32, 33]), ([14], [23], [34, 35]), ([15, 16], [24], [36])]
# fmt: off
#             pair 0: trunk | c | rejected   pair 1 r   pair 2
IDS =            [11, 12, 13, 21, 31, 32,    14, 34,    15, 16]
POSITIONS =      [ 0,  1,  2,  3,  3,  4,     0,  1,     0,  1]
#      place in row 0   1   2   3   4   5     6   7      8   9
TREES = ((0, 3, 4, 6), (6, 7, 7, 8), (8, 10, 10, 10))
TARGETS =         [21, 22,  31, 32, 33,   23,  34, 35,   24,  36]
SCORE_POSITIONS = [ 2,  3,   2,  4,  5,    6,   6,  7,    9,   9]
ANSWER_INDEX =    [ 0,  0,   1,  1,  1,    2,   3,  3,    4,   5]
# fmt: on


def as_lists(row):
    return {
        "input_ids": row.input_ids.tolist(),
        "position_ids": row.position_ids.tolist(),
        "score_positions": row.score_positions.tolist(),
        "target_ids": row.target_ids.tolist(),
        "answer_index": row.answer_index.tolist(),
        "trees": tuple(tuple(tree) for tree in row.trees),
    }


def test_the_row_is_the_one_written_by_hand():
    row = T.pack_row(TRIPLES)
    assert as_lists(row) == {
        "input_ids": [IDS],
        "position_ids": [POSITIONS],
        "score_positions": SCORE_POSITIONS,
        "target_ids": TARGETS,
        "answer_index": ANSWER_INDEX,
        "trees": TREES,
    }
    assert all(tensor.dtype == torch.int64 for tensor in vars(row).values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize(
    ("triple", "expected"),
    [
        (
            ([7], [8], [9]),
            {
                "input_ids": [[7]],
                "position_ids": [[0]],
                "score_positions": [0, 0],
                "target_ids": [8, 9],
                "answer_index": [0, 1],
                "trees": ((0, 1, 1, 1),),
            },
        ),
        (
            ([7], [8, 1], [9]),
            {
                "input_ids": [[7, 8]],
                "position_ids": [[0, 1]],
                "score_positions": [0, 1, 0],
                "target_ids": [8, 1, 9],
                "answer_index": [0, 0, 1],
                "trees": ((0, 1, 2, 2),),
            },
        ),
    ],
)
def test_one_token_answers_have_no_branch(triple, expected):
    assert as_lists(T.pack_row([triple])) == expected


def test_soft_embeddings_take_places_and_positions_like_tokens():
    """Ids below 0 stand in the trunk, before the prompt; no answer and so no target ever has one."""
    assert as_lists(T.pack_row([([-1, -2, 7], [8, 1], [9, 6, 1])])) == {
        "input_ids": [[-1, -2, 7, 8, 9, 6]],
        "position_ids": [[0, 1, 2, 3, 3, 4]],
        "score_positions": [2, 3, 2, 4, 5],
        "target_ids": [8, 1, 9, 6, 1],
        "answer_index": [0, 0, 1, 1, 1],
        "trees": ((0, 3, 4, 6),),
    }


def test_every_scored_token_is_predicted_after_exactly_the_tokens_before_it():
    """What a position sees is read off the row and its trees alone, and must be the prompt and the answer so far."""
    draw = random.Random(0)
    triples = [[[draw.randrange(1000) for _ in range(draw.randint(1, 6))] for _ in range(3)] for _ in range(200)]
    row = as_lists(T.pack_row(triples))
    (ids,), (positions,), seen = row["input_ids"], row["position_ids"], [[] for _ in range(2 * len(triples))]
    for at, target, answer in zip(row["score_positions"], row["target_ids"], row["answer_index"], strict=True):
        start, chosen_start, rejected_start, _ = row["trees"][answer // 2]
        branch_start = rejected_start if answer % 2 else chosen_start
        visible = ids[start:chosen_start] + ids[branch_start : at + 1]
        assert visible == triples[answer // 2][0] + seen[answer]
        assert positions[at] == len(visible) - 1
        seen[answer].append(target)
    assert seen == [answer for _, chosen, rejected in triples for answer in (chosen, rejected)]
    assert [tree[0] for tree in row["trees"]] == [0, *(tree[3] for tree in row["trees"][:-1])]
    assert row["trees"][-1][3] == len(ids) == sum(len(p) + len(c) + len(r) - 2 for p, c, r in triples)


def test_moving_a_row_moves_its_tensors_and_keeps_its_trees():
    row = T.pack_row(TRIPLES)
    moved = row.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.trees == row.trees and row.input_ids.device.type == "cpu"


# --- a batch


def dataset_of(count):
    """Pairs whose every id tells which pair it is of: prompts 100 + n, answers 200 + n and 300 + n."""
    return T.PairDataset(
        [
            T.TokenizedPair([100 + n] * (1 + n % 3), [1, 100 + n], [200 + n] * 2, [300 + n] * (1 + n % 2), None)
            for n in range(count)
        ]
    )


def test_a_batch_has_both_conditions_and_a_row_per_pair():
    dataset = dataset_of(5)
    assert len(dataset) == 5
    assert all(logps.shape == (5, 2) and logps.isnan().all() for logps in dataset.ref_logps.values())
    dataset.ref_logps["base"] = torch.tensor([[-float(n), -10.0 - n] for n in range(5)])
    dataset.ref_logps["pref"] = dataset.ref_logps["base"] - 5
    batch = T.collate_pairs([dataset[(4, 1.0)], dataset[(1, 1.0)], dataset[(4, 0.0)]])
    # prompts of pairs 4 and 1 have two ids, chosen answers two, rejected answers one and two; the last is never read
    assert batch["base"].input_ids.tolist() == [[104, 104, 204, 101, 101, 201, 301, 104, 104, 204]]
    assert batch["pref"].input_ids.tolist() == [[1, 104, 204, 1, 101, 201, 301, 1, 104, 204]]
    assert batch["base"].target_ids.tolist() == [204, 204, 304, 201, 201, 301, 301, 204, 204, 304]
    assert batch["pref"].target_ids.tolist() == batch["base"].target_ids.tolist()
    assert batch["ref_logps"].tolist() == [[-4.0, -14.0], [-1.0, -11.0], [-4.0, -14.0]]
    assert batch["ref_pref_logps"].tolist() == [[-9.0, -19.0], [-6.0, -16.0], [-9.0, -19.0]]
    assert batch["weights"].tolist() == [1.0, 1.0, 0.0] and batch["weights"].dtype == torch.float32
    assert batch["indices"].tolist() == [4, 1, 4]
    assert len(batch["base"].trees) == len(batch["pref"].trees) == 3


# --- dealing pairs out

COUNTS, UPDATES, FORWARDS, WORLDS = (
    (1, 2, 3, 5, 7, 12, 16, 17, 33),
    (1, 2, 3, 4, 5, 8, 16),
    (1, 2, 3, 4, 16),
    (1, 2, 3, 4),
)
DEALS = list(itertools.product(COUNTS, UPDATES, FORWARDS, WORLDS))


def deal(count, per_update, per_forward, world, seed=None, epoch=0, lengths=None):
    """What each rank's sampler yields: rank → forwards → (index, weight)."""
    lengths = [1 + index % 5 for index in range(count)] if lengths is None else lengths
    ranks = []
    for rank in range(world):
        sampler = T.PairSampler(lengths, per_update, per_forward, rank, world, seed)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


def updates_of(ranks, per_update, per_forward):
    """The forwards of every update, all ranks together: each update but the last takes this many on each rank."""
    forwards = math.ceil(per_update / per_forward)
    starts = range(0, len(ranks[0]), forwards)
    return [[items for rank in ranks for items in rank[start : start + forwards]] for start in starts]


def real(forwards):
    return [index for forward in forwards for index, weight in forward if weight]


@pytest.mark.parametrize("seed", [None, 42])
def test_every_pair_counts_exactly_once(seed):
    for case in DEALS:
        ranks = deal(*case, seed=seed)
        items = [item for rank in ranks for forward in rank for item in forward]
        assert sorted(index for index, weight in items if weight) == list(range(case[0])), case
        assert {weight for _, weight in items} <= {0.0, 1.0}, case


def test_all_ranks_make_as_many_forwards():
    for case in DEALS:
        ranks = deal(*case)
        assert len({len(rank) for rank in ranks}) == 1, case
        assert all(1 <= len(forward) <= case[2] for rank in ranks for forward in rank), case


@pytest.mark.parametrize("seed", [None, 42])
def test_an_update_holds_exactly_its_pairs(seed):
    for count, per_update, per_forward, world in DEALS:
        case, size = (count, per_update, per_forward, world), per_update * world
        order = real(deal(count, 1, 1, 1, seed)[0])  # one pair in an update: the order itself
        ranks = deal(*case, seed=seed)
        updates = updates_of(ranks, per_update, per_forward)
        expected = [set(order[start : start + size]) for start in range(0, count, size)]
        assert [set(real(update)) for update in updates] == expected, case
        full, rest = divmod(count, size)
        last = math.ceil(math.ceil(rest / world) / per_forward)
        assert len(ranks[0]) == full * math.ceil(per_update / per_forward) + last, case


def test_fillers_weigh_nothing_and_make_a_forward_where_there_is_no_pair():
    for count, per_update, per_forward, world in DEALS:
        case = (count, per_update, per_forward, world)
        for update in updates_of(deal(*case), per_update, per_forward):
            fillers = [forward for forward in update if any(weight == 0 for _, weight in forward)]
            assert all(len(forward) == 1 for forward in fillers), case
            assert len(fillers) == max(0, len(update) - len(real(update))), case
            assert {forward[0][0] for forward in fillers} <= set(real(update)), case


def test_without_a_seed_the_updates_are_in_the_data_sets_order():
    same = [1] * 7
    assert deal(7, 4, 2, 1, lengths=same) == [
        [[(0, 1.0), (2, 1.0)], [(1, 1.0), (3, 1.0)], [(4, 1.0), (6, 1.0)], [(5, 1.0)]],
    ]
    assert deal(7, 4, 2, 1, epoch=3) == deal(7, 4, 2, 1)
    assert deal(7, 2, 2, 2, lengths=same) == [
        [[(0, 1.0), (2, 1.0)], [(4, 1.0), (6, 1.0)]],
        [[(1, 1.0), (3, 1.0)], [(5, 1.0)]],
    ]
    assert deal(1, 2, 2, 3) == [[[(0, 1.0)]], [[(0, 0.0)]], [[(0, 0.0)]]]


def test_forwards_of_an_update_have_nearly_the_same_number_of_tokens():
    """Of 16 pairs, 4 in a forward, the longest apart from each other; on two ranks too."""
    lengths = [100, 90, 80, 70, *range(12)]
    for seed in (None, 1, 2):
        for world in (1, 2):
            ranks = deal(16, 16 // world, 4, world, seed, lengths=lengths)
            tokens = [sum(lengths[index] for index, _ in forward) for rank in ranks for forward in rank]
            assert len(tokens) == 4 and sum(tokens) == sum(lengths) and max(tokens) <= 105
    rough = torch.randint(10, 300, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [sum(rough[index] for index, _ in forward) for forward in deal(512, 512, 4, 1, 0, lengths=rough)[0]]
    assert len(tokens) == 128 and max(tokens) < 1.02 * sum(rough) / 128


def test_the_updates_depend_on_seed_and_epoch_and_on_nothing_else():
    orders = {(seed, epoch): real(deal(33, 1, 1, 1, seed, epoch)[0]) for seed in (1, 7, 42) for epoch in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert list(range(33)) not in orders.values()
    for (seed, epoch), order in orders.items():
        torch.manual_seed(epoch)  # the global generator plays no part
        expected = [sorted(order[start : start + 8]) for start in range(0, 33, 8)]
        for per_forward, lengths in itertools.product((1, 3, 8, 64), ([1] * 33, range(33))):
            updates = updates_of(deal(33, 8, per_forward, 1, seed, epoch, lengths), 8, per_forward)
            assert [sorted(real(update)) for update in updates] == expected
        ranks = deal(33, 1, 1, 3, seed, epoch, [1] * 33)  # one pair per rank and update: the ranks take turns
        assert [real([forward])[0] for turn in zip(*ranks, strict=True) for forward in turn] == order


def test_each_epoch_begins_anew():
    sampler = T.PairSampler([1] * 12, 4, 4, seed=42)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_pairs_make_an_update_on_any_number_of_ranks(world):
    updates = updates_of(deal(33, 8 // world, 2, world, seed=42), 8 // world, 2)
    single = updates_of(deal(33, 8, 2, 1, seed=42), 8, 2)
    assert [set(real(update)) for update in updates] == [set(real(update)) for update in single]


def test_the_loader_packs_what_the_sampler_deals():
    dataset = dataset_of(7)
    sampler = T.PairSampler(dataset.lengths, 4, 2, rank=1, world_size=2, seed=42)
    loader = T.PairLoader(dataset, sampler)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        dealt = deal(7, 4, 2, 2, seed=42, epoch=epoch, lengths=dataset.lengths)[1]
        batches = list(loader)
        assert len(loader) == len(batches) == len(dealt) == 2
        for batch, items in zip(batches, dealt, strict=True):
            assert list(zip(batch["indices"].tolist(), batch["weights"].tolist(), strict=True)) == items
            first_ids = [batch["base"].input_ids[0, tree.start].item() for tree in batch["base"].trees]
            assert first_ids == [100 + index for index, _ in items]

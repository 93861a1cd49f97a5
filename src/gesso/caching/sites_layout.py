"""From a policy and a network's table to the sites on its modules, and to what can be said before anything is attached.

Not here: names (`placement`), what a site does (`sites`, `sites_tokens`), wrapping (`hooks`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from gesso.cache_settings import CacheSettings, granularities
from gesso.caching.placement import Slot, blocks_of, default_granularity, matching, table_of
from gesso.caching.policy_choice import Policy
from gesso.caching.sites import BlockSite, Board, Placeholder, SlotSite
from gesso.caching.sites_tokens import ClusterSite, FreshSlot, ScoringSlot
from gesso.errors import RequestError

Site = SlotSite | Placeholder | BlockSite | ClusterSite


def policy_for(network: nn.Module, settings: CacheSettings) -> Policy:
    """The policy that settings mean on a network, which may be on the meta device.

    Raises RequestError for a network that is not known, and for fields that do not fit it.
    """
    table = table_of(network)
    if settings.policy == "first_block" and settings.threshold is None:
        settings = settings.model_copy(update={"threshold": table.change})
    if settings.granularity is None and not settings.front_blocks:
        chosen = default_granularity(network, granularities(settings.policy))
        settings = settings.model_copy(update={"granularity": chosen})
    policy = Policy(settings)
    front = policy.settings.front_blocks or 0
    blocks = len(blocks_of(network, table))
    if front >= blocks:
        raise RequestError("cache.front_blocks", front, f"below the {blocks} blocks of {type(network).__name__}")
    return policy


def check(network: nn.Module, settings: CacheSettings, steps: int) -> Policy:
    """Everything that can be refused before the first step: the network, names, and what the policy says of `steps`.

    Raises RequestError. Returns the policy without blanks.
    """
    policy = policy_for(network, settings)
    policy.course(steps)
    if policy.settings.granularity == "module":
        for slot in slots_of(network, policy):
            list(matching(network, slot.pattern))
    return policy


def slots_of(network: nn.Module, policy: Policy) -> tuple[Slot, ...]:
    """The slots of module granularity; the published code's own where that is to be repeated.

    Refiners run in full beside single tokens of the stack, for which they make the inputs.
    """
    table = table_of(network)
    repeats = policy.settings.original and not policy.speculates
    if repeats and table.original_slots is not None:
        return table.original_slots
    return table.slots if policy.settings.original or policy.selects_tokens else (*table.slots, *table.refiners)


def sites_of(network: nn.Module, board: Board) -> Iterator[tuple[nn.Module, Site]]:
    """Every module that is wrapped, with its site; none at trunk granularity."""
    match board.policy.settings.granularity:
        case "block":
            yield from _blocks(network, board)
        case "module":
            yield from _slots(network, board)
            if board.policy.settings.policy == "clusca":
                yield _clusters(network, board)


def _blocks(network: nn.Module, board: Board) -> Iterator[tuple[nn.Module, Site]]:
    blocks = blocks_of(network, board.table)
    for index, (_, block) in enumerate(blocks):
        yield block, BlockSite(board, index, board.policy.settings.front_blocks or 0, len(blocks) - 1)


def _slots(network: nn.Module, board: Board) -> Iterator[tuple[nn.Module, Site]]:
    policy = board.policy
    blocks = [name for name, _ in blocks_of(network, board.table)]
    last = f"{blocks[-1]}." if policy.speculates else None
    for slot in slots_of(network, policy):
        chosen = policy.selects_tokens and slot.kind == "feed_forward"
        for name, module in matching(network, slot.pattern):
            verified = last is not None and name.startswith(last)
            if chosen:
                depth = blocks.index(name.rpartition(".")[0]) / max(len(blocks) - 1, 1)
                yield module, FreshSlot(board, name, slot, depth=depth)
            elif policy.settings.score == "attention" and slot.kind == "attention":
                yield module, ScoringSlot(board, name, slot)
            else:
                yield module, SlotSite(board, name, slot, verified)
        for pattern in () if chosen else slot.inputs:
            for name, module in matching(network, pattern):
                yield module, Placeholder(board, last is not None and name.startswith(last))


def _clusters(network: nn.Module, board: Board) -> tuple[nn.Module, Site]:
    """The last block of the first list that has any: where picture and text are still apart."""
    first = next(name for name in board.table.blocks if len(network.get_submodule(name)._modules))
    *_, (_, block) = matching(network, f"{first}.*")
    return block, ClusterSite(board)

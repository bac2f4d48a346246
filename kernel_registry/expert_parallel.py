"""A mixture-of-experts layer whose experts lie on the ranks of a process group.

    layer = moe_layer(config, w13, w2, expert_map=expert_map, group=torch.distributed.group.WORLD, ...)
    y = layer(hidden_states, router_logits)                  # on every rank, each with tokens of its own

Each rank routes its tokens and sends each of them, once, to every rank that has one of its experts, with its weights
and ids. There `moe.experts` sums over the experts that `expert_map` says are its own; the sums go back, and
`moe.finalize` adds a token's up, with the ranks it has been to as its slots. What is added here is who gets what: no
routing and no arithmetic.

The result is the whole layer's but for where a token's sum over experts is cut: rank by rank, and each rank's part is
cast to the layer's dtype once before it travels. In float32 that is another order of addition, and the same bits where
no more than two numbers are added.

Splits have to be known to the host, so a forward synchronises with the device and can't be captured in a graph.

A rank that can't make its layer, or can't route its tokens, takes part in the next exchange all the same, so that its
peers raise as well instead of waiting for it. What goes wrong later is the process group's to notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping, Sequence

from .layer import EXPERTS, FINALIZE, TOPK, MoELayer

_FAILED = -1  # sent for the number of tokens by a rank that has none to send, since something was wrong with them


@dataclass(eq=False, repr=False)
class ExpertParallelLayer(MoELayer):
    """`moe_layer` makes it where it is given a `group`, whose ranks all do so together: who has which experts is
    gathered once, and each has to be on exactly one of them."""

    group: object = None

    @classmethod
    def together(cls, group, given: Callable[[], Sequence]) -> "ExpertParallelLayer":
        """The layer of MoELayer's arguments, which `given` returns. An error on one rank reaches every rank."""
        import torch.distributed as dist

        from .errors import RankError, TraitError

        if dist.get_rank(group) < 0:  # torch would only warn, and nothing be gathered
            raise TraitError("this process is no member of the group over which the layer's experts are spread",
                             hint="make the layer on the members only, or pass the group that this rank is in")
        failure = None
        try:
            layer = cls(*given(), group)
            mine = layer._share(), ""
        except Exception as error:  # of any kind: peers that were left waiting would learn nothing of it
            failure, mine = error, (None, f"{type(error).__name__}: {error}")
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, mine, group=group)
        if failure is not None:
            raise failure
        failed = {rank: (told,) for rank, (_, told) in enumerate(found) if told}
        if failed:
            raise RankError("\n".join(f"rank {rank} of the group can't make the layer: {told}"
                                      for rank, (told,) in failed.items()),
                            differences=failed, hint="see what that rank says")
        layer._owners = layer._who_has_what([share for share, _ in found])
        return layer

    def _bind(self) -> None:
        import torch.distributed as dist

        from .errors import TraitError

        if self.tensors["expert_map"] is None:
            raise TraitError("a layer over a group of ranks needs an expert_map", where=self.traits.name,
                             hint="an entry for each of the router's experts: its row of w13, or -1 where another "
                                  "rank has it")
        self._dist, self._ranks = dist, dist.get_world_size(self.group)
        self._every = self.tensors["expert_map"].new_tensor(range(self._ranks)).long()
        self.requests[FINALIZE].update(num_experts=self._ranks, topk=self._ranks, reduced=False)
        self.kernels = {op: self.registry.bind(op, **traits) for op, traits in self.requests.items()}
        self._alone = self.registry.bind(FINALIZE, **{**self.requests[FINALIZE], "has_shared": False})

    def _share(self) -> tuple[Mapping[str, str], list[int]]:
        """What the other ranks have to know of this one: its traits, and which experts it has."""
        table = self.tensors["expert_map"]
        shared = {**self.requests[EXPERTS], "num_experts": len(table)}  # the router's, where a rank's own may differ
        traits = {name: str(value) for name, value in shared.items() if name != "platform"}
        return traits, (table >= 0).nonzero().flatten().tolist()

    def _who_has_what(self, shares: Sequence[tuple[Mapping[str, str], list[int]]]):
        """[experts of all ranks] the rank that has each, and one entry more for ids that name none."""
        from .errors import TraitError

        first, _ = shares[0]
        for rank, (others, _) in enumerate(shares):  # rows would be cut in the wrong places where they arrive
            apart = [f"{name}={others.get(name)}, rank 0 has {value}" for name, value in first.items()
                     if others.get(name) != value]
            if apart:
                raise TraitError(f"rank {rank} of the group has {'; '.join(apart)}", where=self.traits.name,
                                 hint="all ranks make the layer of one model together")
        table = self.tensors["expert_map"]
        owners = self._every.new_full((len(table) + 1,), -1, device="cpu")
        for expert in range(len(table)):
            here = [rank for rank, (_, experts) in enumerate(shares) if expert in experts]
            if len(here) != 1:
                raise TraitError(f"expert {expert} is on {f'ranks {here} of' if here else 'no rank of'} the group, "
                                 "expected exactly one", where=self.traits.name,
                                 hint="give each rank the expert_map of its own experts; a copy of an expert would "
                                      "count twice")
            owners[expert] = here[0]
        return owners.to(table.device)

    def __call__(self, hidden_states, router_logits, *, shared_output=None, num_token_non_padded=None, out=None,
                 observe=None):
        """As MoELayer's; every rank of the group has to call, a rank without tokens with none."""
        forked = None
        try:
            self._check(hidden_states, router_logits)
            if shared_output is None and self.shared_expert is not None:
                shared_output, forked = self._shared(hidden_states)
            weights, ids = self._run(observe, TOPK, self.kernels[TOPK], (router_logits, self.correction_bias), dict(
                routed_scaling_factor=self.traits.routed_scaling_factor, num_token_non_padded=num_token_non_padded))
        except Exception:  # the others wait for what this rank sends them
            self._exchange(self._every.new_full((self._ranks,), _FAILED))
            raise
        else:
            parts, ranks = self._over_ranks(observe, hidden_states, weights, ids)
        finally:
            if forked is not None:  # after an error too: the shared expert may read what is written next
                forked.wait_stream(self.shared_stream)
        kernel = self._alone if shared_output is None else self.kernels[FINALIZE]
        out = hidden_states.new_empty(hidden_states.shape) if out is None else out
        return self._run(observe, FINALIZE, kernel, (parts, None, ranks), dict(shared_output=shared_output, out=out))

    def _over_ranks(self, observe, hidden_states, weights, ids):
        """([T, ranks, H] what the experts of each rank give for each token, [T, ranks] the rank where it was there, -1
        where it was not and nothing is written)."""
        known = (ids >= 0) & (ids < len(self._owners) - 1)
        there = self._owners[ids.where(known, -1).long()]
        visits = (there[:, :, None] == self._every).any(dim=1)
        rank, token = visits.t().nonzero(as_tuple=True)  # rank by rank, in the order of the tokens
        sent = visits.sum(dim=0)
        received = self._exchange(sent)
        sent, received = sent.tolist(), received.tolist()
        self._all_sent(received)
        arrived = [self._exchange(x[token], received, sent) for x in (hidden_states, weights, ids)]
        x, own = arrived[0], (self.w13, self.w2)
        y = self._run(observe, EXPERTS, self.kernels[EXPERTS], (x, *own, *arrived[1:]), self.tensors)
        parts = y.new_empty((len(ids), self._ranks, y.shape[1]))
        parts[token, rank] = self._exchange(y, sent, received)
        return parts, self._every.where(visits, -1)

    def _exchange(self, rows, received=None, sent=None):
        """Rows to and from each rank, in their order: as many as `sent` and `received` say, one each where absent."""
        arrived = rows.new_empty((len(rows) if received is None else sum(received), *rows.shape[1:]))
        self._dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self.group)
        return arrived

    def _all_sent(self, received: Sequence[int]) -> None:
        from .errors import RankError

        failed = {rank: ("could not route its tokens",) for rank, count in enumerate(received) if count == _FAILED}
        if failed:
            raise RankError(f"ranks {[*failed]} of the group could not route their tokens", differences=failed,
                            hint="see what they raise; the layer can be called again, by all ranks")

    def _check(self, hidden_states, router_logits) -> None:
        """While the other ranks can still be told: of what is wrong later, they would learn by waiting."""
        from .errors import InputError
        from .traits.dtype import dtype_name

        sizes = (len(router_logits), self.requests[EXPERTS]["hidden_size"])
        got, dtype = dtype_name(hidden_states.dtype), dtype_name(self.requests[FINALIZE]["dtype"])
        if (*hidden_states.shape, got) != (*sizes, dtype):
            raise InputError(f"hidden_states is {[*hidden_states.shape]} {got}, expected {[*sizes]} {dtype}",
                             where=self.traits.name)

    @property
    def output(self) -> str:
        """Where the result goes, in words."""
        return "\n".join([
            f"over {self._ranks} ranks",
            f"  {EXPERTS} runs on the tokens that arrive, {FINALIZE} adds up what comes back: into `out` where there "
            "is one", "  the shared expert: every rank's own, for its own tokens"])

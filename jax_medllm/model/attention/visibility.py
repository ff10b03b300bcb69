"""Who sees whom in a row."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Bool, Int

from jax_medllm.mesh.pytree import Leaf, pytree


@pytree
@dataclass(frozen=True)
class Window:
    """Of what a token might see, it sees what is near.

    Attributes:
        positions: Of the tokens of the row.
        since: The first position that each token sees.
    """

    positions: Int[Leaf, "b s"]
    since: Int[Leaf, "b s"]


@pytree
@dataclass(frozen=True)
class Visibility:
    """A token sees those of its own segment or of its parent segment, up to itself.

    Attributes:
        segments: Segment of each token; 0 is padding.
        parents: Second segment a token sees, 0 for none: the responses of one problem see its prompt, which is computed
            once, and not each other.
        first_query: Place in the row of the first query, where queries are some of the row's tokens and not all.
        window: How far back a token sees; None for all the way.
    """

    segments: Int[Leaf, "b s"]
    parents: Int[Leaf, "b s"] | None = None
    first_query: Int[Leaf, ""] | None = None
    window: Window | None = None

    def mask(self, queries: Int[Leaf, "q"], keys: Int[Leaf, "t"]) -> Bool[Array, "b q t"]:
        """True where one of the tokens at the indices ``queries`` sees one of those at the indices ``keys``.

        Padding sees padding, so that no row of the softmax is empty. An index beyond the row stands for a token after all
        others, which none of them sees.
        """
        seen = self.segments[:, None, keys]
        same = self.segments[:, queries, None] == seen
        if self.parents is not None:
            parents = self.parents[:, queries, None]
            same |= (parents == seen) & (parents != 0)
        if self.window is not None:
            same &= self.window.since[:, queries, None] <= self.window.positions[:, None, keys]
        return same & (keys <= queries[:, None])

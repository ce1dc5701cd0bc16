"""GBNF grammars of the modes, for `llama-server` and `llama-cli`: they name markers by id, so text is never one."""

from collections.abc import Iterable, Mapping, Sequence

from mote.core.scheme import Chain

# No special token and no marker is spelled without "<|", so a step cannot hold one.
_TEXT = 'text ::= ([^<] | "<"+ [^<|])+'


def mode_grammar(chains: Iterable[Chain], markers: Mapping[str, Sequence[int]]) -> str:
    """A grammar that allows these chains.

    Args:
        chains: The chains of a mode.
        markers: Step -> ids of its start and end marker.
    """
    lines = [" ".join(f"<[{markers[step][0]}]> text <[{markers[step][1]}]>" for step in chain) for chain in chains]
    return f"root ::= {' | '.join(lines)}\n{_TEXT}\n"

"""Slabs and rings as a GPU has them, on the CPU; and slabs that punish being touched too early."""

from mova import slabs
from mova.slabs import Link, Slab


def with_rings(monkeypatch, piece=slabs.PIECE_BYTES):
    """Weights go through a ring of host buffers of `piece` bytes, as for a GPU; the copies are made on the CPU."""
    build = Link.__init__

    def build_with_ring(link, *args):
        build(link, *args)
        link.ring = link.make_ring()

    monkeypatch.setattr(slabs, "PIECE_BYTES", piece)
    monkeypatch.setattr(Link, "__init__", build_with_ring)


def poison_slabs(monkeypatch):
    """A slab is full of NaN from the moment it is given back, and has to be filled again."""
    give_back = Slab.give_back

    def poison(slab):
        slab.buffer.fill_(0xFF)  # NaN in every float format
        slab.holds = None
        give_back(slab)

    monkeypatch.setattr(Slab, "give_back", poison)

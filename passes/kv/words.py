"""The kinds of every slot, as a table: which fields a word takes, what it says, and what it does to the numbers.

`lacks` is not empty where the numpy interpreter does not run a word, and says why; `memcomp kv show` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memcomp.passes.kv.slots import Basis, Cut, Map, Merge, Place, Project, Residue, Select, Share, Update

CLASSES = ("exact", "bounded", "semantic")  # from the strictest: what the oracle may ask of the whole is the last one


@dataclass(frozen=True, slots=True)
class Word:
    """takes: fields beside the word itself.  kind: one of `CLASSES`.  says: one sentence.

    sized: do the bytes follow from the specification alone?
    """

    takes: tuple[str, ...]
    kind: str
    says: str
    lacks: str = ""
    sized: bool = True


SCORED = ("budget", "share", "unit", "when", "mode")
WORDS: dict[type[Any], dict[str, Word]] = {
    Cut: {
        "k": Word(("rope",), "exact", "the keys"),
        "v": Word((), "exact", "the values"),
        "x": Word(("width",), "exact", "the layer's input, from which the reader computes keys and values"),
        "c": Word(("width",), "exact", "a latent vector for all heads, from which keys and values are projected"),
        "r": Word(("width",), "exact", "the rotary part of the keys, one for all heads"),
        "a": Word((), "exact", "attention weights, for the layers that share them",
                  "weights grow with the square of the length, and no reader of them is written", sized=False),
        "s": Word(("width",), "exact", "the state of a recurrence", "a state has no tokens to read", sized=False),
    },
    Share: {
        "layers": Word(("group", "map", "producer", "trained"), "exact", "layers that read one storage"),
        "heads": Word(("group", "map", "producer", "trained"), "exact", "heads that read one storage"),
        "prefixes": Word((), "exact", "sequences share what they have in common, and copy it before they write"),
    },
    Select: {
        "norm": Word(SCORED, "semantic", "keys of small norm stay; known when a key is written"),
        "direction": Word(SCORED, "semantic", "keys far along one direction a head stay (table `direction`)"),
        "attention": Word((*SCORED, "weighted"), "semantic",
                          "what all queries gave a key, summed; needs the final normaliser, so two passes"),
        "strip": Word((*SCORED, "window", "pool", "weighted"), "semantic",
                      "what the newest queries gave a key, smoothed; two passes over a strip"),
        "pages": Word(SCORED, "semantic", "the query against the mean key of each unit, at every read"),
        "variance": Word((*SCORED, "window"), "semantic", "mean and variance of what queries gave a key",
                         "two running sums a key that no reader keeps yet"),
        "similar": Word((*SCORED, "window"), "semantic", "keys that queries like the newest ones needed",
                        "a window of bits a key that no reader keeps yet"),
        "clusters": Word(SCORED, "semantic", "the query against centres of clusters of keys",
                         "clusters of keys are not built"),
        "channels": Word(("budget", "share", "window", "when"), "semantic",
                         "channels of keys that the newest queries use", "a selection of channels is not built",
                         sized=False),
        "entropy": Word(SCORED, "semantic", "entropy of the token that the model predicted",
                        "its score comes from the model's last layer, which a cache does not see"),
        "learned": Word(SCORED, "semantic", "a trained score", "it needs a trained controller"),
        "noisy": Word((*SCORED, "window"), "semantic", "the sum of attention with noise added before it is normalised",
                      "its noise is random, and its schedule is the paper's"),
        "rules": Word(SCORED, "semantic", "what the caller prunes by its own rules", "it needs the caller's rules"),
    },
    Merge: {
        "mean": Word(("group",), "semantic", "neighbours become their mean, which counts as often (group=0: all one)"),
        "anchors": Word(("group",), "semantic", "tokens join the anchor that is most like them",
                        "grouping by likeness is not built", sized=False),
        "clusters": Word(("group",), "semantic", "centres of clusters of keys", "clusters of keys are not built",
                         sized=False),
        "learned": Word(("group",), "semantic", "a trained gate says which token joins the last one",
                        "it needs a trained gate", sized=False),
        "state": Word((), "semantic", "what is dropped goes into a state of constant size",
                      "it needs a trained kernel of its own", sized=False),
        "layers": Word(("group",), "semantic", "one direction for neighbouring layers, and a length for each",
                       "merging over layers is not built", sized=False),
    },
    Basis: {
        "hadamard": Word(("rank", "size", "where"), "exact", "a Walsh-Hadamard rotation"),
        "orthogonal": Word(("rank", "size", "where"), "exact", "a given rotation (table `orthogonal`)"),
        "permute": Word(("rank", "where", "pairs"), "exact", "a given order (table `permute`)"),
        "scale": Word(("rank", "where", "pairs"), "exact", "a given factor for each channel (table `scale`)"),
        "offset": Word(("where",), "exact", "less a given vector (table `offset`), as a bias of the projection"),
    },
    Project: {
        "offline": Word(("rank", "where", "nested"), "bounded", "a basis that calibration found (table `project`)"),
        "trained": Word(("rank", "where", "nested"), "bounded", "a trained basis (table `project`)"),
        "sequence": Word(("rank", "where"), "bounded", "a basis found anew for each sequence",
                         "a decomposition behind prefill is not built"),
    },
    Residue: {
        "outliers": Word(("share",), "bounded", "the largest values, apart and exact"),
        "lowrank": Word(("rank",), "bounded", "the error of the codec, as a product of two thin matrices"),
        "predict": Word((), "bounded", "a prediction from what is stored already is taken off before the codec",
                        "predictors from another layer are not built"),
    },
    Map: {
        "dense": Word(("order", "scales", "align", "pad", "positions"), "exact", "one buffer a stream"),
        "pages": Word(("size", "order", "scales", "align", "pad", "positions"), "exact",
                      "pages of so many tokens, found through a table of 32-bit numbers"),
        "virtual": Word(("size", "order", "scales", "align", "pad", "positions"), "exact",
                        "one range of addresses, whose memory is committed by so many tokens"),
    },
    Place: {
        "device": Word(("ahead",), "exact", "the memory beside the reader"),
        "host": Word(("ahead",), "exact", "the host's memory"),
        "flash": Word(("ahead",), "exact", "storage"),
        "remote": Word(("ahead",), "exact", "the memory of another device, which also runs the reader"),
    },
    Update: {
        "token": Word(("rollback", "rewrite"), "exact", "each token is written as it comes"),
        "group": Word(("every", "rollback", "rewrite"), "exact", "so many tokens are encoded together, once"),
        "prefill": Word(("every", "rollback", "rewrite"), "exact", "encoded behind the prompt, and then by groups"),
    },
}
CHOICES = {  # fields whose value is a word
    "rope": ("after", "before"), "producer": ("first", "last"), "rank": ("e", "h"), "scales": ("side", "inline",
                                                                                                "trailing"),
    "where": ("stored", "weights", "query", "tile"), "when": ("write", "prefill", "token", "read"),
    "mode": ("drop", "recall", "rebuild"), "order": ("bhn", "bnh", "hbn", "nbh", "hnb", "nhb"),
}
WHERE = {Basis: ("stored", "weights"), Project: ("weights", "query", "tile")}
FLOATS = ("f16", "bf16", "f32", "f64")  # codecs that store a number as it is


def word(slot: Any) -> Word:
    """The row of a slot's value."""
    return WORDS[type(slot)][slot.word]
UNBUILT = {  # codecs that systems name and that are none of `codecs.FAMILIES`
    "sparse": "a few (index, weight) pairs over a trained dictionary",
    "bipolar": "planes of bits that count +1 and -1",
}

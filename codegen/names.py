"""Identifiers of kernel text."""

from __future__ import annotations

import keyword
import re


class Names:
    """Identifiers that are free in kernel text; the user's names where they are identifiers."""

    def __init__(self, taken: set[str]) -> None:
        self.used = {*taken, *keyword.kwlist}
        self.known: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self.known:
            self.known[name] = self.fresh(re.sub(r"\W", "_", name.replace("'", "_new")), plain=True)
        return self.known[name]

    def fresh(self, stem: str, plain: bool = False) -> str:
        if not stem.isidentifier():
            stem = f"v{stem}" if f"v{stem}".isidentifier() else "v"
        name, k = (stem if plain else f"{stem}1"), 1
        while name in self.used:
            k += 1
            name = f"{stem}{k}"
        self.used.add(name)
        return name

    def forget(self, names: set[str]) -> None:
        """Let another kernel bind these names anew."""
        for n in names:
            self.known.pop(n, None)

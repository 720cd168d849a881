"""The tuning cache: what is written is read again, what is damaged is a miss, merging knows no order."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcomp.__main__ import main
from memcomp.cache import CacheWarning, Choice, Entry, Layers, Measured, Rejected, Store, environment, layers
from memcomp.cache.entry import FORMAT, LONGEST, better
from memcomp.cache.transfer import difference, entries, exported, taken

HERE = {"device": {"kind": "cpu", "cores": 2}, "code": "c0de", "versions": {}}
names = st.text("abcdefgh", min_size=1, max_size=4)
numbers = st.integers(-2**53, 2**53)
choices = st.builds(Choice, st.sampled_from(["", "one share", "2 shares"]), st.dictionaries(names, numbers, max_size=3),
                    st.sampled_from(["", "gluon"]))
seconds = st.floats(1e-9, 1e3)


def measured() -> st.SearchStrategy[Measured]:
    return st.builds(Measured, seconds, st.floats(0, 1), st.integers(1, 3), st.floats(0, 1), st.floats(1, 2),
                     st.floats(0, 1), st.sampled_from(["", "warm"]), st.just("2026-11-22"))


def some(problem: int = 0, env: Any = HERE) -> st.SearchStrategy[Entry]:
    return st.builds(Entry, st.just({"program": f"p{problem}"}), st.just(env), choices, measured(),
                     st.lists(st.builds(Rejected, choices, st.sampled_from(["wrong", "slow"])), max_size=2).map(tuple),
                     st.lists(names, max_size=2).map(lambda x: tuple(sorted(set(x)))))


def entry(problem: int = 0, median: float = 1e-3, env: Any = HERE, knob: int = 32) -> Entry:
    return Entry({"program": f"p{problem}"}, env, Choice("", {"bp": knob}), Measured(median, 0.1, 5, 0.5, 1.0))


@given(some())
def test_an_entry_is_read_as_it_was_written(e: Entry) -> None:
    assert Entry.read(e.text()).text() == e.text()


@given(some(), some(), some())
def test_merging_knows_no_order(a: Entry, b: Entry, c: Entry) -> None:
    texts = {better(better(x, y), z).text() for x, y, z in permutations((a, b, c))}
    texts |= {better(x, better(y, z)).text() for x, y, z in permutations((a, b, c))}
    assert len(texts) == 1
    once = better(a, b)
    assert better(once, b).text() == once.text() == better(once, once).text()
    files = {exported(p) for p in permutations((a, b, c))}
    assert len(files) == 1 and exported(entries(files.pop())) == exported([a, b, c])


def test_origins_and_rejections_survive_a_merge() -> None:
    wrong = Rejected(Choice("", {"bp": 64}), "wrong result")
    a = replace(entry(median=2e-3), rejected=(wrong,), origins=("one",))
    b = replace(entry(median=1e-3), origins=("two",))
    assert better(a, b).measured.median == 1e-3
    assert better(a, b).origins == ("one", "two") and better(a, b).rejected == (wrong,)


def test_a_choice_that_another_measurement_rejected_is_not_used(tmp_path: Path) -> None:
    store, e = Store(tmp_path), entry()
    store.put(e)
    assert store.get(e.problem, e.environment) is not None
    store.join(replace(entry(median=5e-3, knob=64), rejected=(Rejected(e.choice, "wrong result"),)))
    assert store.get(e.problem, e.environment) is None


def test_other_problems_environments_and_stores_do_not_answer(tmp_path: Path) -> None:
    store, e, there = Store(tmp_path), entry(), {**HERE, "code": "other"}
    store.put(e)
    assert store.get({"program": "p1"}, HERE) is None and store.get(e.problem, there) is None
    assert [h.choice for h in store.hints(e.problem, there)] == [e.choice], "elsewhere it is a hint"
    assert not store.hints(e.problem, HERE) and not store.hints({"program": "p1"}, there)


def test_the_nearest_layer_answers_and_the_writable_one_is_written(tmp_path: Path) -> None:
    user, shipped = Store(tmp_path / "user"), Store(tmp_path / "shipped")
    shipped.put(entry(median=1e-3, knob=16))
    both = Layers(user, Store(shipped.root, False))
    assert both.get({"program": "p0"}, HERE).choice.knobs == {"bp": 16}  # type: ignore[union-attr]
    assert both.writable is user
    user.put(entry(median=9e-3, knob=32))
    assert both.get({"program": "p0"}, HERE).choice.knobs == {"bp": 32}  # type: ignore[union-attr]
    with pytest.raises(PermissionError):
        both.stores[1].put(entry())
    assert layers(mode="off").get({"program": "p0"}, HERE) is None and layers(mode="read").writable is None


def test_the_environment_is_of_plain_values_and_stays_the_same() -> None:
    a = environment("cpu")
    assert json.loads(json.dumps(a)) == a == environment("cpu")
    code = "from memcomp.cache import environment; import json; print(json.dumps(environment('cpu')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == a


def test_all_that_decides_which_kernel_a_choice_is_is_in_the_environment(tmp_path: Path) -> None:
    """Whatever of memcomp runs on the way from a program and a choice to a kernel, but for what only checks it, or
    ranks choices: one byte more of it is another environment; of what does not run, it is the same."""
    import memcomp
    from memcomp.cache.environment import FILES, ROOMS, digested
    from memcomp.config import Config
    from memcomp.ir.text import parse
    from memcomp.pipeline import tunable

    package = Path(memcomp.__file__).parent
    ran: set[str] = set()

    def seen(frame: Any, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            ran.add(path.relative_to(package).as_posix())

    t = tunable(parse((Path(__file__).parent / "cases" / "cascade_2.mc").read_text()), config=Config(
        backend="python"), sizes={})
    sys.setprofile(seen)
    try:
        t.compiled(t.modelled)
        tunable(t.read, config=t.config, sizes={})
    finally:
        sys.setprofile(None)
    checks = {"recheck.py", "tune/model.py", "cache/entry.py"}
    assert {f for f in ran if not f.startswith(tuple(f"{room}/" for room in ROOMS))} - checks <= set(FILES)
    copy = tmp_path / "memcomp"
    for part in (*ROOMS, *FILES):
        (copy / part).parent.mkdir(parents=True, exist_ok=True)
        if part in ROOMS:
            shutil.copytree(package / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(package / part, copy / part)
    texts = {digested(copy)}
    assert texts == {environment("cpu")["code"]}, "a copy is the same"
    (copy / "backend.py").touch()
    assert digested(copy) in texts
    changed = [*FILES, *(f"{room}/__init__.py" for room in ROOMS), "ir/targets/cpu.toml", "codegen/tvm/emit.py"]
    for n, part in enumerate(changed):
        with (copy / part).open("a") as file:
            file.write("#")
        texts.add(digested(copy))
        assert len(texts) == n + 2, part


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(e: Entry, rng: random.Random) -> bytes:
    """The text of an entry, with one thing wrong."""
    text = e.text().encode()
    data = json.loads(text)
    kind = rng.randrange(12)
    if kind == 0:
        return text[:rng.randrange(len(text) - 1)]
    if kind == 1:
        at = rng.randrange(len(text) - 1)
        return text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1:]  # whichever bit it is
    if kind == 2:
        data["format"] = rng.choice([0, 1, FORMAT + 1, "2", None, True, 1.5, 10**400])
    elif kind == 3:
        data.pop(rng.choice(list(data)))
    elif kind == 4:
        data["more"] = 1
    elif kind == 5:
        data["measured"]["median"] = rng.choice([float("nan"), float("inf"), -1.0, 0, "1", 10**30, True, None, []])
    elif kind == 6:
        data["choice"]["knobs"] = rng.choice([{"bp": 10**30}, {"bp": 1.5}, {"bp": "32"}, {"bp": True}, [],
                                              {"x" * 9999: 1}])
    elif kind == 7:
        data["problem"] = rng.choice([{"program": "other"}, [], {}, "p0", None, {"a": {"a": {"a": {"a": {"a": {
            "a": {"a": {"a": 1}}}}}}}}])
    elif kind == 8:
        data["environment"] = rng.choice([{"code": "../../etc"}, {}, 3])
    elif kind == 9:
        data["rejected"] = rng.choice([[{"choice": {}, "why": "x"}], ["x"] * 9999, {}, None, [[]]])
    elif kind == 10:
        return rng.choice([b"", b"\0" * 100, b"\xff\xfe", b"[" * 100000, b"null", b"1e999", b" " * (LONGEST + 9),
                           b'{"format":2}', b"NaN"])
    else:
        data["measured"]["error"] = data["measured"]["bound"] + 1
    return json.dumps(data).encode()


def ruin(folder: Path, count: int, seed: int) -> None:
    """Each of `count` files, however damaged, is a miss with at most one warning, and is never used."""
    store, rng = Store(folder), random.Random(seed)
    for n in range(count):
        e = entry(n)
        path = store.put(e)
        text = damaged(e, rng)
        if n % 50 == 49:
            path.unlink()
            os.symlink(rng.choice(["/etc/passwd", "/dev/zero", str(folder), "nowhere"]), path)
        else:
            path.write_bytes(text)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert store.get(e.problem, e.environment) is None, text[:200]
            assert store.get(e.problem, e.environment) is None
        assert len(seen) <= 1 and all(w.category is CacheWarning for w in seen)
        assert not [h for h in store.hints(e.problem, {"code": "other"}) if h.key != e.key]
        assert store.put(e) == path and store.get(e.problem, e.environment) is not None, "a good entry takes its place"
        path.write_bytes(text)


def test_a_damaged_file_is_a_miss(tmp_path: Path) -> None:
    ruin(tmp_path, 300, 0)


@pytest.mark.slow
def test_two_thousand_damaged_files_are_misses(tmp_path: Path) -> None:
    ruin(tmp_path, 2000, 1)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(text: bytes) -> None:
    try:
        Entry.read(text)
    except ValueError:
        pass


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    store, e = Store(tmp_path), entry()
    path = store.put(e)
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(CacheWarning, match="no plain file"):
        assert store.get(e.problem, e.environment) is None


# -- many at once ------------------------------------------------------------------------------------------------------


def work(root: Path, seed: int, keys: int, duration: float, out: Any) -> None:
    """Write and read entries; each that is found must be whole and of its problem."""
    store, rng, count, until = Store(root), random.Random(seed), 0, time.time() + duration
    warnings.simplefilter("error")
    try:
        while time.time() < until:
            n = rng.randrange(keys)
            if rng.random() < 0.5:
                store.put(entry(n, median=rng.random() + 1e-6, knob=n))
            found = store.get({"program": f"p{n}"}, HERE)
            if found is not None:
                assert found.choice.knobs == {"bp": n}
            count += 1
        out.put((count, ""))
    except BaseException as error:
        out.put((count, repr(error)))


def crowd(root: Path, processes: int, keys: int, duration: float) -> int:
    context = multiprocessing.get_context("spawn")
    out: Any = context.Queue()
    store = Store(root)
    for n in range(keys):
        store.put(entry(n, knob=n))
    workers = [context.Process(target=work, args=(root, n, keys, duration, out)) for n in range(processes)]
    for w in workers:
        w.start()
    told = [out.get(timeout=duration + 120) for _ in workers]
    for w in workers:
        w.join()
    assert not [e for _, e in told if e]
    assert {f.path.stem for f in store.files() if f.entry is not None} == {entry(n).key for n in range(keys)}
    assert all(f.entry is not None for f in store.files()) and not list((root / f"v{FORMAT}").glob("*/.*"))
    return sum(n for n, _ in told)


def test_processes_that_write_the_same_entries_lose_none(tmp_path: Path) -> None:
    assert crowd(tmp_path, 2, 20, 1.0) > 0


@pytest.mark.slow
def test_sixteen_processes_for_a_minute_lose_no_entry(tmp_path: Path) -> None:
    assert crowd(tmp_path, 16, 1000, 60.0) > 1000


# -- on the way between machines, and by hand --------------------------------------------------------------------------


def test_what_was_measured_elsewhere_is_a_hint(tmp_path: Path) -> None:
    there = {**HERE, "device": {"kind": "cpu", "cores": 64}}
    away, here = Store(tmp_path / "away"), Store(tmp_path / "here")
    away.put(entry(env=there))
    made = taken(here, exported(away.entries()))
    assert (made.new, made.known, made.bad) == (1, 0, ())
    assert here.get({"program": "p0"}, HERE) is None and len(here.hints({"program": "p0"}, HERE)) == 1
    assert taken(here, exported(away.entries())).known == 1


def test_a_file_with_what_is_no_entry_gives_the_others(tmp_path: Path) -> None:
    data = json.loads(exported([entry(0), entry(1)]))
    data["entries"].append({"format": 1})
    made = taken(Store(tmp_path), json.dumps(data))
    assert made.new == 2 and len(made.bad) == 1
    d = difference([entry(0), entry(1)], [entry(1, knob=8), entry(2)])
    assert [len(x) for x in (d.left, d.right, d.changed)] == [1, 1, 1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "none"))
    yield tmp_path


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["cache", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_every_command_says_what_it_did(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    store, e = Store(folder / "cache"), entry()
    assert told(capsys, "ls")[0] == 0
    store.put(e)
    code, out, _ = told(capsys, "ls")
    assert code == 0 and e.key[:12] in out and "bp=32" in out and "2 cores" in out
    code, out, _ = told(capsys, "ls", "--json")
    assert e.key in [r["key"] for r in json.loads(out)]
    code, out, _ = told(capsys, "show", e.key[:8])
    assert code == 0 and json.loads(out)[0]["choice"]["knobs"] == {"bp": 32}
    code, _, err = told(capsys, "show", "nothing")
    assert code == 2 and err.startswith("error: no entry's key begins with 'nothing'")
    code, out, _ = told(capsys, "export", folder / "a.json")
    assert code == 0 and out.startswith("1 entries in ")
    store.put(entry(1))
    assert told(capsys, "export", folder / "b.json")[1].startswith("2 entries in ")
    code, out, _ = told(capsys, "diff", folder / "a.json", folder / "b.json")
    assert code == 1 and out.startswith("only in ")
    assert told(capsys, "diff", folder / "a.json", folder / "a.json")[:2] == (0, "no difference\n")
    code, out, _ = told(capsys, "merge", folder / "a.json", folder / "b.json", "-o", folder / "c.json")
    assert code == 0 and out.startswith("2 entries of 3 in ")
    assert (folder / "c.json").read_bytes() == (folder / "b.json").read_bytes()
    assert told(capsys, "import", folder / "c.json")[:2] == (0, "0 new or changed, 2 known, 0 not taken\n")
    assert told(capsys, "verify")[:2][0] == 0
    store.path(e.problem, HERE).write_text("{")
    code, out, _ = told(capsys, "verify")
    assert code == 1 and "not JSON" in out
    code, out, _ = told(capsys, "gc", "--dry-run")
    assert out.endswith("2 files would be deleted\n") and len(list(store.files())) == 2
    assert told(capsys, "gc")[1].endswith("2 files deleted\n"), "one is none, one is of another code"
    assert not list(store.files())
    code, out, _ = told(capsys, "stats")
    assert code == 0 and str(store.root) in out and "read only" in out


def test_a_cache_that_may_not_be_written_says_so(capsys: pytest.CaptureFixture[str], folder: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.json").write_text(exported([entry()]))
    monkeypatch.setenv("MEMCOMP_CACHE", "read")
    code, _, err = told(capsys, "import", folder / "a.json")
    assert code == 2 and err.startswith("error: the cache is read only or off")
    monkeypatch.setenv("MEMCOMP_CACHE", "off")
    assert told(capsys, "stats")[1] == "the cache is off\n"
    kept = (folder / "a.json").read_text()
    for command in (("ls",), ("show", "a"), ("verify",), ("export", folder / "a.json")):
        code, _, err = told(capsys, *command)
        assert code == 2 and err.startswith("error: the cache is off"), command
    assert (folder / "a.json").read_text() == kept
    monkeypatch.setenv("MEMCOMP_CACHE", "sometimes")
    assert told(capsys, "stats")[0] == 2
    assert told(capsys, "import", folder / "nothing.json")[0] == 2


def test_what_ships_with_the_package_is_valid() -> None:
    from memcomp.cache import shipped

    assert all(f.entry is not None for f in shipped().files())


def test_a_cache_that_is_not_ours_to_read_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put(entry())

    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    assert not list(store.entries()) and not store.hints({"program": "p0"}, {"other": 1})
    assert Store(tmp_path / "f" / "g").get({"program": "p0"}, HERE) is None
    (tmp_path / "f").touch()
    assert Store(tmp_path / "f").get({"program": "p0"}, HERE) is None
    folder = Store(tmp_path / "folders")
    folder.path({"program": "p0"}, HERE).mkdir(parents=True)
    with pytest.warns(CacheWarning, match="no plain file"):
        assert folder.get({"program": "p0"}, HERE) is None


def test_a_user_without_a_home_has_no_layer_of_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda p: p)  # as where neither HOME nor the user is known
    found = layers()
    assert not found.stores[0].root.parts[0].startswith("~") and found.get({"program": "p0"}, HERE) is None
    with pytest.raises(OSError):
        found.stores[0].check()


def test_a_folder_of_the_user_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert layers("~/tuned").stores[0].root == Path("/home/somebody/tuned")


def test_what_cannot_be_deleted_or_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path))
    (tmp_path / f"v{FORMAT}" / "x" / "a.json").mkdir(parents=True)
    assert main(["cache", "verify"]) == 1 and "no plain file" in capsys.readouterr().out
    assert main(["cache", "gc"]) == 1
    told = capsys.readouterr()
    assert "not deleted" in told.err and "0 files deleted" in told.out
    (tmp_path / "some").write_text("{")
    assert main(["cache", "import", str(tmp_path / "some")]) == 2
    assert "is no file of entries" in capsys.readouterr().err

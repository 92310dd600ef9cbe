"""Keys follow the code that is called; files are whole, of one writer, and what they say."""

import functools
import importlib
import json
import logging
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from processes import two_processes

from tsp_utils import TSPClustering, cache, heads, knn_accuracy, nearest_neighbors
from tsp_utils.cache import code_called_by, code_of, entries, key_of, keys
from tsp_utils.study import profile
from tsp_utils.systems import rivals

MODULE = '''
"""A module."""
import functools
import numpy as np
SCALE = 2.0
UNUSED = 1

def helper(x):
    """One line."""
    return SCALE * x  # a comment

def unused(x):
    return x

@functools.lru_cache
def wrapped(x):
    return helper(x)

class Network:
    width: int = 3
    def forward(self, x):
        return helper(x)
    def describe(self):
        return "a network"

REGISTRY = {"a": helper, "b": unused}

def called(x: float) -> float:
    """Doubles."""
    from toy_package.other import imported_late
    return np.abs(wrapped(x)) + imported_late(x) + len(REGISTRY)

def called_with(network, x):
    return network.forward(x)
'''
OTHER = "def imported_late(x):\n    return x + 1\n"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Write the toy package with one edit, import it anew, and return its module."""
    (tmp_path / "toy_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(keys, "PACKAGE", "toy_package")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "toy_package" / "__init__.py").touch()

    def forget():
        for name in [name for name in sys.modules if name.startswith("toy_package")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        keys._text_of_trees.cache_clear()  # code that differs in its type hints alone is equal

    def write(old: str = "", new: str = "", other: str = OTHER):
        assert old in MODULE
        (tmp_path / "toy_package" / "module.py").write_text(MODULE.replace(old, new, 1))
        (tmp_path / "toy_package" / "other.py").write_text(other)
        forget()
        return importlib.import_module("toy_package.module")

    yield write
    forget()


def both_codes(module):
    """Of a function, and of one that is called with a network."""
    return code_of(module.called), code_of(module.called_with, module.Network())


@pytest.mark.parametrize("old, new, changes", [
    ("SCALE * x", "SCALE + x", (True, True)), ("SCALE = 2.0", "SCALE = 3.0", (True, True)),
    ("np.abs", "np.sign", (True, False)),
    ("return helper(x)\n\nclass", "return -helper(x)\n\nclass", (True, False)),
    ("return helper(x)\n    def", "return helper(-x)\n    def", (False, True)),
    *((*edit, (False, False)) for edit in (
        ("One line.", "Two lines."), ("# a comment", "# another"), ("x: float", "x"),
        ("UNUSED = 1", "UNUSED = 2"), ("unused(x):\n    return x", "unused(x):\n    return -x"),
        ('"""A module."""', '"""A module.\n\nWith more lines, so that all others move.\n"""'),
        ('return "a network"', 'return "one"'))),
])
def test_what_is_called_and_the_constants_it_names_count_alone(toy, old, new, changes):
    before, after = both_codes(toy()), both_codes(toy(old, new))
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changes


def test_what_is_given_by_content_is_not_followed_and_nothing_else_is_left_out(toy):
    def codes(module):
        return code_of(module.called, given=[module.helper]), code_of(module.called)

    kept, followed = codes(toy())
    assert kept != followed
    edited = codes(toy("SCALE * x", "SCALE + x"))
    assert edited[0] == kept and edited[1] != followed
    assert codes(toy("np.abs", "np.sign"))[0] != kept


def test_imports_where_they_are_used_and_replacements_count(toy, monkeypatch):
    called, called_with = both_codes(toy())
    assert code_of(toy(other=OTHER.replace("+ 1", "+ 2")).called) != called
    module = toy()
    with monkeypatch.context() as patch:
        patch.setattr(module, "helper", lambda x: x)
        assert code_of(module.called) != called  # bound now, whoever did it
    monkeypatch.setattr(module.Network, "forward", lambda self, x: x)
    assert both_codes(module)[1] != called_with


def test_a_librarys_function_is_no_code_of_ours_by_whichever_door_it_comes(toy):
    """Else keys would hang on the order in which names are met, and on versions of libraries."""
    module = toy("from toy_package.other import imported_late\n",
                 "from toy_package import other\n    imported_late = other.dedent\n",
                 other=f"from textwrap import dedent\n{OTHER}")
    with mock.patch.object(keys, "_digest", return_value="") as digest:
        code_of(module.called)
    names = {text.split(":")[0] for text in digest.call_args[0][0].values()}
    assert {"called", "helper"} <= names and "dedent" not in names


def test_code_without_source_counts_by_its_code_object():
    def made(text):
        scope = {}
        exec(f"def f(x):\n    return {text}\n", scope)
        return scope["f"]

    assert code_of(made("x + 1")) == code_of(made("x + 1")) != code_of(made("x + 2"))
    assert code_of(functools.partial(made("x + 1"), 2)) == code_of(made("x + 1"))


def test_a_file_edited_after_its_import_is_not_taken_for_what_runs(toy, tmp_path):
    module = toy()
    before = code_of(module.helper)
    (tmp_path / "toy_package" / "module.py").write_text(MODULE.replace("SCALE * x", "SCALE - x"))
    edited = code_of(module.helper)  # the old code still runs, under a key of its own
    assert edited != code_of(toy("SCALE * x", "SCALE - x").helper)
    assert before == code_of(toy().helper) != edited


def test_a_notebook_s_key_follows_what_it_calls_and_no_comment():
    """What is reached and what is not, by notebook: tests/test_edits.py."""
    source = "import tsp_utils as tsp\ntsp.tsp_loss(a, b)\n"
    assert code_called_by(source) == code_called_by(source + "\n# a comment\n1 + 1\n")
    assert code_called_by(source) != code_called_by(source + "tsp.train_heads()")


def test_every_function_of_the_package_has_a_tree_that_is_what_runs():
    """Else keys would differ between versions of Python."""
    for module in (heads, rivals, profile):
        for value in vars(module).values():
            function = keys._function(value)
            if function is not None and function.__module__ == module.__name__:
                assert keys._syntax(function)[0], function.__qualname__


def test_inputs_count_by_content():
    x = np.arange(6.0).reshape(2, 3)
    assert key_of({"x": x}) == key_of({"x": x[::1].copy()}) == key_of({"x": np.asfortranarray(x)})
    assert key_of(slice(None)) != key_of(slice(3)) and key_of(np.float32(1)) == key_of(1.0)
    different = [x.T, x.astype(np.float32), x + 1, x.reshape(3, 2)]
    assert len({key_of({"x": each}) for each in [x, *different]}) == 5
    with pytest.raises(TypeError, match="input of type object has no content"):
        key_of({"x": object()})


@pytest.fixture
def folder(tmp_path, own_folders) -> Path:
    return tmp_path / "cache"


def squares(seeds):
    return {"squares": np.array([[seed**2] for seed in seeds])}


def test_seeds_are_made_once_and_a_file_grows(folder):
    make = mock.Mock(side_effect=squares)
    for wanted in (range(2), range(4), [3, 1], range(3)):
        found, n_read = cache.seeds("heads", "toy", {}, [squares], wanted, make)
        assert found["squares"][:, 0].tolist() == [seed**2 for seed in wanted]
    assert make.call_args_list == [mock.call([0, 1]), mock.call([2, 3])] and n_read == 3
    assert {"torch", "machine"} <= json.loads(found["made_with"][0]).keys()
    assert len(list(folder.glob("heads/*.npz"))) == 1 and not list(folder.rglob("*.partial"))


def grown(n):
    def make(seeds):
        time.sleep(0.5)
        return squares(seeds)

    return cache.seeds("heads", "toy", {}, [], range(n), make)[0]["squares"][:, 0].tolist()


def test_two_that_grow_one_file_lose_nothing(folder):
    with two_processes() as both:
        assert list(both.map(grown, (6, 3))) == [[0, 1, 4, 9, 16, 25], [0, 1, 4]]
    assert cache.seeds("heads", "toy", {}, [], range(6), None)[1] == 6


def test_a_damaged_or_foreign_file_is_named_and_made_again(folder, caplog):
    def arrays(value):
        return cache.arrays("toys", "toy", {}, [squares], lambda: {"x": np.array(value)})["x"]

    assert arrays(1) == 1 == arrays(2)
    (path,) = folder.glob("toys/*.npz")
    for damage in (path.read_bytes()[:100], b""):
        path.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert arrays(3) == 3
        assert path.name in caplog.text and "made again" in caplog.text
        caplog.clear()
    np.savez(path.open("wb"), x=4)  # of an earlier version, without a description
    assert arrays(5) == 5 and "does not match its description" in caplog.text


def test_an_error_leaves_nothing_and_a_record_comes_back(folder):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"^no$"):
        cache.record("records", "run", {"seed": 0}, [], fail)
    assert not list(folder.rglob("*.npz"))
    wanted = {"acc": [1.5, 2], "name": "é"}
    assert cache.record("records", "run", {"seed": 0}, [], lambda: wanted) == wanted
    assert cache.record("records", "run", {"seed": 0}, [], fail) == wanted


@pytest.fixture
def made(monkeypatch):
    """Counts what is made and not read back."""
    counted = mock.Mock(return_value="{}")
    monkeypatch.setattr(entries, "made_with", counted)
    return counted


def test_a_call_is_read_back_as_it_was_until_its_arguments_change(folder, made):
    def table(x, n=2):
        return pd.DataFrame({"name": ["a", "b"], "value": x[:n]})

    x = np.random.default_rng(0).normal(size=(30, 4))
    labels = np.arange(30) % 3
    plainly, accuracy = nearest_neighbors(x, 5), knn_accuracy(x, labels)
    for _ in range(2):
        pd.testing.assert_frame_equal(cache.call(table, x[0]), table(x[0]))
        found = cache.call(nearest_neighbors, x, 5)
        assert type(found) is type(plainly) and found.metric == "cosine"
        np.testing.assert_array_equal(found.indices, plainly.indices)
        np.testing.assert_array_equal(found.distances, plainly.distances)
        found = cache.call(knn_accuracy, x, labels)
        assert type(found) is type(accuracy) and found == accuracy
    assert made.call_count == 3
    cache.call(table, x[1])
    cache.call(table, x[0], n=2)
    assert made.call_count == 5


teacher, network = np.arange(2), mock.Mock()


def test_what_a_function_takes_from_around_it_counts(folder, made):
    around = np.arange(3.0)

    def scaled():
        return {"x": 2 * around}

    assert cache.call(scaled)["x"].tolist() == [0, 2, 4] == cache.call(scaled)["x"].tolist()
    assert made.call_count == 1
    around = np.arange(4.0)
    assert cache.call(scaled)["x"].tolist() == [0, 2, 4, 6] and made.call_count == 2
    around = object()
    with pytest.raises(TypeError, match="has no content that a key could be made of"):
        cache.call(scaled)
    assert keys.data_of(lambda: network.teacher) == {"network": network}


def test_a_fitted_estimator_comes_back_as_it_was(folder):
    x = np.random.default_rng(0).normal(size=(40, 6)) + 4 * np.eye(6)[np.arange(40) % 3]
    settings = dict(n_clusters=3, n_init=2, max_epochs=3, min_steps=0, n_neighbors=5)
    first, again = (cache.fitted(TSPClustering(random_state=0, **settings), x) for _ in range(2))
    plainly = TSPClustering(random_state=0, **settings).fit(x)
    for model in (first, again):
        np.testing.assert_allclose(model.predict_proba(x), plainly.predict_proba(x))
        np.testing.assert_allclose(model.history_["loss"], plainly.history_["loss"])
    assert again.get_feature_names_out().tolist() == plainly.get_feature_names_out().tolist()
    other = cache.fitted(TSPClustering(random_state=1, **settings), x)
    assert not np.allclose(other.coef_, first.coef_)
    cache.fitted(TSPClustering(**settings), x)  # of any seed: not kept
    assert len(list(folder.glob("fits/*.npz"))) == 2

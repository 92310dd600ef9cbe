"""What the notebooks' check cells call: an answer is right, or one sentence says what to do next.

It lies beside the notebooks, so that a copied folder is whole, and knows no answer itself.
"""

import re
from contextlib import contextmanager

import numpy as np

UNWRITTEN = ("is not written yet; put your code in the place of the stub in the cell above, and "
             "run that cell")


class NotYet(Exception):
    """One sentence to the student, which Jupyter shows without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


@contextmanager
def check(number: str, answer: str):
    """The checks of one exercise, "03.2", whose answer has this name: all pass, or NotYet says."""
    try:
        yield
    except NotYet as error:
        sentence = str(error)
    except NotImplementedError:
        sentence = f"`{answer}` {UNWRITTEN}."
    except Exception as error:
        name = getattr(error, "name", None) if isinstance(error, NameError) else None
        said = re.split(r"\.?\n|\. |\.$", str(error))[0][:150]  # its first sentence
        if name == answer:
            sentence = f"`{answer}` is not there; run the cell above this one first."
        elif name:
            sentence = (f"`{name}` is not there; run the cell that begins with \"For the "
                        f"exercises\", or correct the name.")
        elif "ellipsis" in said:
            sentence = f"`{answer}` {UNWRITTEN}."
        else:
            sentence = f"`{answer}` stopped with {type(error).__name__}: {said}."
    else:
        print(f"Exercise {number}: right.")
        return
    raise NotYet(f"Exercise {number}: {sentence.rstrip('.')}.")


def expect(holds, sentence: str) -> None:
    """Raise NotYet with the sentence unless it holds."""
    if not holds:
        raise NotYet(sentence)


def array_of(given, shape: tuple) -> np.ndarray:
    """An answer as an array of this shape; NotYet for nothing, no numbers, another shape."""
    if given is ...:
        raise NotImplementedError
    expect(given is not None, "it returns nothing; end it with `return` and the result.")
    given = given.detach().cpu().numpy() if hasattr(given, "detach") else given
    try:
        found = np.asarray(given, float)
    except (TypeError, ValueError):
        raise NotYet(f"it is a {type(given).__name__}, and numbers of the shape {shape} are "
                     f"wanted.") from None
    expect(found.shape == shape, f"its shape is {found.shape}, and {shape} is wanted.")
    return found


def compare(given, right, hints=None, otherwise: str = "", tolerance: float = 1e-3) -> None:
    """Raise NotYet unless an answer is the right one, within a tolerance where it is of numbers.

    hints: a sentence -> the value that a known mistake gives; otherwise: what any other is told.
    """
    right = right.detach().cpu().numpy() if hasattr(right, "detach") else np.asarray(right)
    words = right.dtype.kind == "U"
    if given is ... or not words:
        found = array_of(given, right.shape)
    else:
        found = np.asarray(given)
        expect(found.dtype.kind == "U", f"it is a {type(given).__name__}, and text is wanted.")

    def agrees(value) -> bool:
        if words:
            return found.shape == np.shape(value) and bool(np.all(found == value))
        return np.allclose(found, array_of(value, right.shape), tolerance, tolerance)

    if not agrees(right):
        for sentence, value in (hints or {}).items():
            expect(not agrees(value), sentence)
        shown = f"{found}" if found.ndim == 0 else f"the first is {found.ravel()[:1]}"
        raise NotYet(otherwise or f"{shown}, which is not right yet.")


def predicted(name: str, names: dict) -> None:
    """Raise NotYet while the box of a prediction, a name in a notebook's `globals()`, is empty."""
    expect(name in names, f"`{name}` is not there; run the box above, with your prediction in it.")
    expect(str(names[name]).strip(), f"`{name}` is empty; write your prediction into the box "
                                     f"above and run it, then this cell.")

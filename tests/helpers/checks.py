"""What the tests of the exercises about models share: probes, and sentences about what they find.

With queries of 0 all scores are equal, and with one-hot values the output of a query shows the keys
that it attends to. Keys that are the number of their position show which ones a cache stores.
"""

import functools
import inspect
import itertools

import torch
from exercises import missing

__tracebackhide__ = True  # pytest shows the reader's lines and those of the test alone

# Calls and results ----------------------------------------------------------------------------


def with_shapes(function):
    """Return the function; if it raises an exception, the message ends with the shapes it got."""

    @functools.wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except NotImplementedError:
            raise
        except Exception as error:
            names = inspect.signature(function).parameters
            shapes = [
                f"{name} {written(value.shape)}"
                for name, value in zip(names, arguments, strict=False)
                if torch.is_tensor(value)
            ]
            error.args = (f"{error}\n{function.__name__} got {', '.join(shapes)}",)
            raise

    return call


def check_shape(what, value, letters, shape, dtype=torch.float32):
    """Fail with a sentence unless a value is a tensor of a shape and a dtype; None: any."""
    if not torch.is_tensor(value):
        missing(f"{what} must be a tensor, but is {kind(value)}")
    sizes = zip(value.shape, shape, strict=False)
    if value.dim() != len(shape) or any(size not in (own, None) for own, size in sizes):
        missing(f"{what} must be {letters} = {written(shape)}, but is {written(value.shape)}")
    if dtype not in (None, value.dtype):
        missing(f"{what} must be {name_of(dtype)}, but is {name_of(value.dtype)}")


def check_pair(what, value):
    """Return a pair of values; fail with a sentence unless it is one."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        missing(f"{what} must return two tensors, but returns {kind(value)}")
    return value


def check_equal(what, value, expected, tolerance=1e-4):
    """Fail with a sentence unless two tensors of one shape agree; name a difference."""
    wrong = ~((value - expected).abs() <= tolerance)  # also where a number is nan
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        came, correct = value[tuple(index)].item(), expected[tuple(index)].item()
        missing(f"{what}: {index} must be {correct:.4f}, but is {came:.4f}")


def check_device(function, *arguments):
    """Fail with a sentence if a function makes tensors on another device than its arguments'.

    The device meta stands for a GPU: its tensors have no values.
    """
    try:
        return function(*(x.to("meta") if torch.is_tensor(x) else x for x in arguments))
    except NotImplementedError:
        raise
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        name = next(iter(inspect.signature(function).parameters))
        missing(f"{function.__name__} makes a tensor on the CPU: give it device={name}.device")


def kind(value):
    """Return a few words about a value that is not what it should be."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None:
        return "None: a return is missing"
    return "a single tensor" if torch.is_tensor(value) else f"of type {type(value).__name__}"


def written(shape):
    """Return a shape as text, with S for an unknown size."""
    return f"({', '.join('S' if size is None else str(size) for size in shape)})"


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# Attention ------------------------------------------------------------------------------------


def check_mask(attend, heads, T, S, window=None, case=""):
    """Fail with a sentence unless each query attends to its own key and those before it.

    attend   a function of q (1, H, T, D), k and v (1, G, S, D)
    heads    H and G
    window   the number of keys a query attends to; None: all
    case     the beginning of the sentence
    """
    H, G = heads
    q, k = torch.zeros(1, H, T, S), torch.zeros(1, G, S, S)
    y = attend(q, k, torch.eye(S).expand(1, G, S, S))
    check_shape("the result of attention", y, "(B, H, T, D)", (1, H, T, S))
    i = torch.arange(S - T, S)[:, None]
    j = torch.arange(S)
    expected = (j <= i) & (i - j < (window or S))  # (T, S)
    wrong = ((y[0] > 0) != expected).nonzero()
    if len(wrong):
        _, t, j = wrong[0].tolist()
        i = S - T + t
        first = max(0, i - (window or S) + 1)
        keys = f"keys {first} to {i}" if first < i else f"key {i}"
        query = f"{case}the query at position {i}"
        if S > T:
            query += f", after {S - T} cached tokens,"
        if expected[t, j]:
            queries = "query is" if T == 1 else "queries are"
            place = f" (the {queries} at the last {T if T > 1 else 'one'} of the {S} positions)"
            is_misplaced = S > T and j < i
            missing(
                f"{query} does not attend to key {j}, but must attend to {keys}"
                f"{place if is_misplaced else ''}"
            )
        if j > i:
            missing(f"{query} attends to key {j}, which comes later")
        missing(f"{query} attends to key {j}, which has left the window: its window is {keys}")


def check_scale(attend, heads, T, S):
    """Fail with a sentence unless scores are divided by sqrt(D)."""
    H, G = heads
    q, k = torch.zeros(1, H, T, S), torch.zeros(1, G, S, S)
    q[..., 0] = 3.0
    k[:, :, -1, 0] = 1.0  # the score of the last key is 3 / sqrt(D), that of the others 0
    y = attend(q, k, torch.eye(S).expand(1, G, S, S))
    score = (y[0, 0, -1, -1] / y[0, 0, -1, -2]).log().item()
    if not abs(score - 3 / S**0.5) < 1e-4:
        missing(
            f"the scores must be divided by sqrt(D): with D = {S} a product q.k of 3 becomes "
            f"{3 / S**0.5:.4f}, but here {score:.4f}"
        )


def check_dropout(attention, attend, heads, T, S):
    """Fail with a sentence unless attention drops probabilities in training, and only then.

    attention   the module, with dropout=0.5
    """
    H, G = heads
    q, k, v = torch.zeros(8, H, T, 4), torch.zeros(8, G, S, 4), torch.ones(8, G, S, 4)
    case = f"with {T} queries and {S} keys"
    attention.eval()
    if not torch.allclose(attend(q, k, v), torch.ones(8, H, T, 4)):
        missing(f"{case} attention drops probabilities in evaluation: use dropout in training only")
    attention.train()
    if torch.allclose(attend(q, k, v), torch.ones(8, H, T, 4)):
        missing(
            f"{case} attention drops no probability in training: dropout_p must be self.dropout"
        )


def random_qkv(heads, T, S, D=4):
    """Return random q (2, H, T, D), k and v (2, G, S, D), so large that softmax is no average."""
    H, G = heads
    generator = torch.Generator().manual_seed(0)
    shapes = (2, H, T, D), (2, G, S, D), (2, G, S, D)
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


def by_loops(q, k, v, window=None):
    """Compute attention one query at a time, in float64."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    y = torch.empty(B, H, T, D, dtype=torch.float64)
    for row, head, t in itertools.product(range(B), range(H), range(T)):
        i = S - T + t
        attended = slice(max(0, i + 1 - (window or S)), i + 1)
        group = head // (H // G)
        keys, values = k[row, group, attended].double(), v[row, group, attended].double()
        scores = keys @ q[row, head, t].double() / D**0.5
        y[row, head, t] = scores.softmax(dim=0) @ values
    return y.float()


# Caches ---------------------------------------------------------------------------------------


def numbered(first, T, B=2):
    """Return keys (B, 2, T, 4) that are 1 + their position, from `first` on, and minus that."""
    keys = torch.arange(first + 1.0, first + T + 1).view(1, 1, T, 1).expand(B, 2, T, 4)
    return keys, -keys


def extend(cache, first, T, layer=0, B=2):
    """Give a cache the tokens at T positions; return the keys and values that it returns.

    cache.pos is set to `first`, as GPT.forward sets it.
    """
    cache.pos = first
    try:
        pair = with_shapes(cache.extend)(layer, *numbered(first, T, B))
    except ValueError as error:
        said = str(error).partition("\n")[0]
        missing(
            f"{T} tokens at pos = {first} fit into max_len = {cache.max_len}, but extend raises "
            f"ValueError: {said}"
        )
    check_pair("extend", pair)
    for name, x in zip(("keys", "values"), pair, strict=True):
        what = f"the tensor of {name} that extend returns for a batch of {B}"
        check_shape(what, x, "(B, H, S, D)", (B, 2, None, 4))
    if cache.pos != first:
        missing(
            f"extend changed pos from {first} to {cache.pos}: the other layers still need it, "
            f"and GPT.forward advances it"
        )
    return pair


def positions(x):
    """Return the positions of keys or values (B, H, S, D) as text: "0 1 -", with - for none."""
    words = []
    for slot in x.unbind(dim=2):
        numbers = slot.unique()
        is_one = len(numbers) == 1 and numbers[0] >= 0
        words.append("?" if not is_one else f"{int(numbers[0]) - 1}" if numbers[0] else "-")
    return " ".join(words)


def check_positions(what, keys, values, expected, reason, any_order=False):
    """Fail with a sentence unless keys and values are those of the expected positions.

    expected   text like "0 1 -"
    """
    if (keys < 0).any():
        missing(f"{what}: values are where keys must be")
    if (values > 0).any():
        missing(f"{what}: keys are where values must be")
    for name, came in (("keys", positions(keys)), ("values", positions(-values))):
        is_equal = sorted(came.split()) == expected.split() if any_order else came == expected
        if not is_equal:
            empty = " (- stands for an empty slot)" if "-" in came + expected else ""
            missing(
                f"{what}: the {name} are those of positions {came or 'none'}, "
                f"but must be those of {expected}: {reason}{empty}"
            )


def check_full(cache, first, T, needed):
    """Fail with a sentence unless tokens that do not fit raise ValueError and are not stored."""
    before = cache.k.clone(), cache.v.clone()
    cache.pos = first
    case = f"{T} tokens at pos = {first} do not fit into max_len = {cache.max_len}"
    error = None
    try:
        cache.extend(0, *numbered(first, T))
    except NotImplementedError:
        raise
    except Exception as raised:
        error = raised
    if error is None:
        missing(f"{case}: extend must raise ValueError, but accepts them")
    if not isinstance(error, ValueError):
        missing(f"{case}: extend must raise ValueError, but torch raises {type(error).__name__}")
    numbers = str(cache.max_len), str(needed)
    if not all(number in str(error) for number in numbers):
        missing(f"{case}: the message of ValueError must have both {' and '.join(numbers)}")
    if not (torch.equal(cache.k, before[0]) and torch.equal(cache.v, before[1])):
        missing(f"{case}: extend must raise ValueError before it changes the cache")

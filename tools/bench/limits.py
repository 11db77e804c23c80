"""The machine's limits: rates of matrix products at the shapes of a training step, and bandwidth.

Every other benchmark shows which fraction of these limits it reaches.

Shapes: B batch, T tokens, C channels, V vocabulary.
"""

import statistics

import torch
import torch.nn.functional as F

from tools.bench.sizes import dtype_name, dtypes
from tools.results.turns import compare, split, spread, stopwatch


def limit_stopwatch(device, run, *arguments):
    """Return a contestant for a limit; on a GPU, where a call takes microseconds, of 20 calls."""
    calls = 1 if device.type == "cpu" else 20
    return stopwatch(device, run, *arguments, calls=calls)


# Matrix products ------------------------------------------------------------------------------


def linear_layers(config):
    """Return {layer: (channels in, channels out, how many of them)}; the head is one."""
    C, V, n_layer = config.n_embd, config.vocab_size, config.n_layer
    return {
        "attn.c_attn": (C, 3 * C, n_layer),
        "attn.c_proj": (C, C, n_layer),
        "mlp.c_fc": (C, 4 * C, n_layer),
        "mlp.c_proj": (4 * C, C, n_layer),
        "head": (C, V, 1),
    }


def random_operands(rows, n_in, n_out, device, dtype):
    """Return an input (rows, n_in), a weight (n_out, n_in) and a gradient (rows, n_out)."""
    shapes = [(rows, n_in), (n_out, n_in), (rows, n_out)]
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def forward_product(x, weight, gradient):
    return F.linear(x, weight)


def input_gradient(x, weight, gradient):
    return gradient @ weight


def weight_gradient(x, weight, gradient):
    return gradient.t() @ x


PRODUCTS = {
    "forward": forward_product,
    "input_gradient": input_gradient,
    "weight_gradient": weight_gradient,
}


def step_products(sizes, device, dtype):
    """Return a function that does the matrix products of a step's weights, and nothing else.

    Forward product, gradient of the input and gradient of the weight of every Linear layer and of
    the head, each with tensors of its own as in the step. attention_products() has the others.
    """
    operands = []
    for n_in, n_out, count in linear_layers(sizes.config()).values():
        for _ in range(count):
            operands.append(random_operands(sizes.tokens, n_in, n_out, device, dtype))

    def run():
        for x, weight, gradient in operands:
            for product in PRODUCTS.values():
                product(x, weight, gradient)

    return run


def attention_products(sizes, device, dtype):
    """Return a function that does the matrix products of a step's attention, and nothing else.

    In each layer two in the forward pass (scores, weighted values) and four in the backward pass.
    A causal mask leaves half of the T x T scores; T / 2 queries by T keys is the same work.
    """
    config = sizes.config()
    heads, T, D = (
        sizes.batch_size * config.n_head,
        config.block_size,
        config.n_embd // config.n_head,
    )
    q = torch.randn(heads, T // 2, D, device=device, dtype=dtype)
    k = torch.randn(heads, T, D, device=device, dtype=dtype)
    scores = torch.randn(heads, T // 2, T, device=device, dtype=dtype)

    def run():
        for _ in range(config.n_layer):
            for _ in range(2):  # scores and their gradient
                torch.bmm(q, k.mT)
            for _ in range(2):  # weighted values, the gradient of the queries
                torch.bmm(scores, k)
            for _ in range(2):  # the gradients of the keys and of the values
                torch.bmm(scores.mT, q)

    return run


def products_flops(sizes):
    """Return the FLOPs of step_products: 2 per weight, row and product."""
    layers = linear_layers(sizes.config()).values()
    weights = sum(n_in * n_out * count for n_in, n_out, count in layers)
    return 2 * len(PRODUCTS) * sizes.tokens * weights


def with_precision(precision, function, *arguments):
    torch.set_float32_matmul_precision(precision)
    function(*arguments)


def precisions(device):
    """Return {name: (dtype, float32 precision)} of the kinds of products that a device has."""
    kinds = {dtype_name(dtype): (dtype, "highest") for dtype in dtypes(device)}
    if device.type == "cuda":
        kinds["tf32"] = (torch.float32, "high")
    return kinds


def matmul_rows(bench, deadline):
    """Return one row per precision and layer: the rates of its three products."""
    sizes, device = bench.sizes, bench.device
    layers = linear_layers(sizes.config())
    contestants = {}
    for kind, (dtype, precision) in precisions(device).items():
        for layer, (n_in, n_out, _) in layers.items():
            operands = random_operands(sizes.tokens, n_in, n_out, device, dtype)
            for name, product in PRODUCTS.items():
                turn = limit_stopwatch(device, with_precision, precision, product, *operands)
                contestants[kind, layer, name] = turn
    times = compare(deadline, contestants)
    rows = []
    for kind in precisions(device):
        for layer, (n_in, n_out, _) in layers.items():
            row = {"dtype": kind, "layer": layer, "rows": sizes.tokens, "in": n_in, "out": n_out}
            gigaflops = 2 * sizes.tokens * n_in * n_out / 1e9
            for name in PRODUCTS:
                rates = [gigaflops / t for t in times[kind, layer, name]]
                row[f"{name}_gflops"] = spread(rates)
            rows.append(bench.show(row))
        rows.append(bench.show(whole_step_row(kind, sizes, times)))
    return rows


def whole_step_row(kind, sizes, times):
    """Return the rate of all products of a step together, each layer as often as it occurs."""
    seconds = 0.0
    for layer, (_, _, count) in linear_layers(sizes.config()).items():
        for name in PRODUCTS:
            seconds += count * statistics.median(times[kind, layer, name])
    row = {"dtype": kind, "layer": "all products of a step", "rows": sizes.tokens}
    return row | {"gflops": products_flops(sizes) / seconds / 1e9, "seconds": seconds}


def matmul_rates(bench):
    """Return {dtype: FLOP/s} of the forward product of mlp.c_fc: a short measurement."""
    sizes, device = bench.sizes, bench.device
    n_in, n_out, _ = linear_layers(sizes.config())["mlp.c_fc"]
    contestants = {}
    for dtype in dtypes(device):
        operands = random_operands(sizes.tokens, n_in, n_out, device, dtype)
        contestants[dtype] = limit_stopwatch(device, forward_product, *operands)
    times = compare(bench.limit_deadline(), contestants)
    flops = 2 * sizes.tokens * n_in * n_out
    return {dtype: flops / statistics.median(times[dtype]) for dtype in contestants}


# Memory ---------------------------------------------------------------------------------------


def read_contestants(bench):
    """Return the functions that read a large tensor once; the fastest one gives the limit."""
    x = torch.ones(bench.sizes.read_bytes // 4, device=bench.device)
    readers = {
        "sum of float32": x.sum,
        "maximum of float32": x.amax,
        "sum of int64": x.view(torch.int64).sum,
        "maximum of int32": x.view(torch.int32).amax,
        "maximum of int64": x.view(torch.int64).amax,
    }
    return {name: limit_stopwatch(bench.device, read) for name, read in readers.items()}


def fastest_reader(bench):
    """Return the contestant that reads sizes.read_bytes fastest, on all threads.

    It can take part in a comparison: the bandwidth of a shared machine varies over time.
    """
    contestants = read_contestants(bench)
    times = compare(bench.limit_deadline(), contestants)
    return contestants[min(times, key=lambda name: statistics.median(times[name]))]


def bandwidth(bench, times):
    """Return the bytes/s of a reader from the seconds of its rounds."""
    return bench.sizes.read_bytes / statistics.median(times)


def memory_rows(bench, deadline):
    """Return a row for the fastest way to read memory, and one for a copy."""
    device, size = bench.device, bench.sizes.read_bytes
    contestants = read_contestants(bench)
    source = torch.ones(size // 4, device=device)
    contestants["copy"] = limit_stopwatch(device, torch.empty_like(source).copy_, source)
    times = compare(deadline, contestants)
    copy_times = times.pop("copy")
    fastest = min(times, key=lambda name: statistics.median(times[name]))
    read = spread([size / 1e9 / t for t in times[fastest]])
    copy = spread([2 * size / 1e9 / t for t in copy_times])
    return [
        bench.show({"what": "read", "by": fastest, "gb_per_second": read}),
        bench.show({"what": "copy, read + written bytes", "by": "copy_", "gb_per_second": copy}),
    ]


def measure_limits(bench):
    """Return rows with the rates of matrix products and the bandwidth of memory."""
    precision = torch.get_float32_matmul_precision()
    deadlines = split(bench.deadline, [4, 1])
    rows = matmul_rows(bench, next(deadlines))
    torch.set_float32_matmul_precision(precision)
    return rows + memory_rows(bench, next(deadlines))

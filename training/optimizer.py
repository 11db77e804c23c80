"""The optimizers: AdamW and Muon.

AdamW divides the gradient of each weight by its root mean square over the last steps. Muon looks at
a weight matrix as a whole: see the class.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from common.distributed import full_tensor

OPTIMIZERS = ("adamw", "muon")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3 and x^5 (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 5
MAX_NUMEL = 2**24  # elements that Muon orthogonalizes at a time, which bounds its memory


def make_optimizer(model, config, dtype=torch.float32):
    """Return the optimizer that config.optimizer names, for all parameters of a model.

    dtype   of the computation, for Muon
    """
    if config.optimizer == "adamw":
        return make_adamw(model.parameters(), config)
    hidden = hidden_matrices(model)
    others = [p for p in model.parameters() if p not in hidden]
    return Muon(
        hidden,
        adamw=make_adamw(others, config),
        lr=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        dtype=dtype,
    )


def make_adamw(parameters, config):
    """Return AdamW (Loshchilov & Hutter 2019): decay on matrices, none on biases and norms."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    param_groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [param_group for param_group in param_groups if param_group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def hidden_matrices(model):
    """Return {parameter: row counts} for the 2-D parameters in the blocks.

    The rows of a parameter are those of one matrix or, in c_attn, of three: q has as many rows as
    columns, n_embd; k and v share the rest. They are different linear maps of the same input.
    """
    matrices = {}
    for name, p in model.transformer.h.named_parameters():
        if p.dim() != 2:
            continue
        rows, columns = p.shape
        matrices[p] = [rows]
        kv_rows, remainder = divmod(rows - columns, 2)
        if name.endswith("c_attn.weight") and kv_rows > 0 and remainder == 0:
            matrices[p] = [columns, kv_rows, kv_rows]
    return matrices


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for all other parameters, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum
    U S V^T (its singular value decomposition) of a matrix by the nearest orthogonal one, U V^T. A
    gradient has a few large singular values and many small ones: with S, a step moves few
    directions; without it, all of them, equally far. Of all updates that change no output by more
    than the learning rate (for inputs of norm 1), U V^T decreases the loss most, to first order
    (Bernstein & Newhouse 2024).

    This holds for a matrix that maps one hidden vector to another. A row of an embedding (the
    tied head too) belongs to a token: most get no gradient in a step, and an orthogonal update
    would move them as far as the others. A vector, such as a bias, has no directions to equalize.

    A step subtracts lr * sqrt(max(1, rows / columns)) * U V^T, after decaying the matrix as AdamW
    does. The root makes the change of an output element about lr for inputs of unit variance,
    whatever the shape, so that one rate fits all widths. (Liu et al. 2025 scale by 0.2
    sqrt(max(rows, columns)) instead, the size of AdamW's updates, for which AdamW's rates fit.)

    hidden         {parameter: row counts}, see hidden_matrices
    adamw          the optimizer of the other parameters
    lr             for `hidden`, the group param_groups[0]; those of adamw follow it
    dtype          of the run: if float32, so is the orthogonalization; else it is bfloat16, whose
                   rounding errors are smaller than the ones that Newton-Schulz leaves

    Under FSDP the momentum is sharded as the parameters are. The updates are gathered, because U
    and V depend on all rows; each rank orthogonalizes them and keeps its rows.
    """

    def __init__(self, hidden, adamw, lr, weight_decay, dtype, momentum=0.95):
        self.row_counts = hidden
        self.adamw = adamw
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        muon_group = {
            "params": list(hidden),
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        super().__init__([muon_group, *adamw.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step. DCP passes closure=None, of torch's interface; others are not supported."""
        assert closure is None
        muon_group, *adamw_groups = self.param_groups
        # Loading a state dict replaces state and groups, so they are handed over at each step.
        self.adamw.state = self.state
        self.adamw.param_groups = adamw_groups
        self.adamw.step()
        matrices = [p for p in muon_group["params"] if p.grad is not None]
        for batch in split_by_size(matrices, MAX_NUMEL):
            self.step_matrices(batch, muon_group)

    def step_matrices(self, matrices, group):
        """Update some matrices. Under FSDP a collective, because their updates are gathered."""
        for p in matrices:
            if p not in self.state:
                self.state[p] = {"momentum": torch.zeros_like(p)}
        gradients = [p.grad for p in matrices]
        momenta = [self.state[p]["momentum"] for p in matrices]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        # Nesterov: the momentum that the next step would have if the gradient stayed the same.
        nesterov = torch._foreach_add(gradients, momenta, alpha=group["momentum"])

        updates = [full_tensor(momentum.to(self.dtype)) for momentum in nesterov]
        parts = []  # views of the updates, one for each of the matrices in a parameter
        for p, update in zip(matrices, updates, strict=True):
            parts += update.split(self.row_counts[p])
        orthogonalize_(parts)
        for part in parts:
            rows, columns = part.shape
            part.mul_(max(1, rows / columns) ** 0.5)

        shards = []
        for p, update in zip(matrices, updates, strict=True):
            shards.append(shard_like(update.float(), p))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, shards, alpha=-group["lr"])


def split_by_size(tensors, max_numel):
    """Yield lists of successive tensors, each of at most max_numel elements or one tensor."""
    batch = []
    for tensor in tensors:
        if batch and sum(t.numel() for t in batch) + tensor.numel() > max_numel:
            yield batch
            batch = []
        batch.append(tensor)
    if batch:
        yield batch


def shard_like(tensor, parameter):
    """Return this rank's shard of a full tensor, sharded as the parameter is, if it is."""
    if not isinstance(parameter, DTensor):
        return tensor
    # src_data_rank=None: each rank has the full tensor, so nothing is sent.
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def orthogonalize_(matrices):
    """Orthogonalize matrices in place; those of equal shape as one batch, which is faster."""
    by_shape = {}
    for matrix in matrices:
        wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
        by_shape.setdefault(wide.shape, []).append(wide)
    for same_shape in by_shape.values():
        for wide, result in zip(same_shape, newton_schulz(torch.stack(same_shape)), strict=True):
            wide.copy_(result)


def newton_schulz(x):
    """Return U V^T, nearly, for each matrix U S V^T of a batch (N, rows, columns), rows <= columns.

    One step maps x to a x + b (x x^T) x + c (x x^T)^2 x, which leaves U and V as they are and maps
    each singular value s to a s + b s^3 + c s^5. From anywhere in (0, 1], this polynomial leads to
    about 1 (0.7 to 1.2). Small values need the steep start, a = 3.4, which is why it does not
    converge to 1 itself; training does not mind. Zero stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    # The Frobenius norm is at least the largest singular value, so that all are at most 1.
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-30).to(x.dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)  # (N, rows, rows), symmetric
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x

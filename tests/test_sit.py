"""The denoiser: interpolants, the latents' BatchNorm, SiT and its loading against autograd, nn.BatchNorm2d, timm and
closed forms.

    python -m pytest tests/test_sit.py
"""
import math
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F

import sit as S
from sample import load_pipeline, published_sit

PATHS = ["linear", "cosine"]
TINY = S.SiTConfig(depth=3, width=24, heads=3, patch=2, channels=4, size=8, num_classes=5, teacher_dims=(6, 10),
                   align_depth=2, projector_width=16)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(a, b):
    """The largest difference, relative to the reference's largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def randomised(net, std=0.2):
    """Every parameter random: the zeros of adaLN-Zero would hide mistakes."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(std * noise(*p.shape, seed=i))
    return net


# ---- Interpolants --------------------------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_interpolant(path):
    """t = 0 is data, t = 1 is noise; the derivatives are autograd's; v is dz_t/dt of the same zn and eps."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = S.interpolant(t, path)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        assert torch.allclose(torch.autograd.grad(value.sum(), t)[0], derivative)
    ends = torch.stack([alpha[[0, -1]], sigma[[0, -1]]])
    assert torch.allclose(ends, torch.eye(2).double()) and (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    zn, eps = noise(11, 2, 3, 3), noise(11, 2, 3, 3, seed=1)
    z_t, v = torch.func.jvp(lambda t: S.interpolate(zn, eps, t, path)[0], (t.detach(),), (torch.ones_like(t),))
    assert all(torch.allclose(a, b) for a, b in zip(S.interpolate(zn, eps, t, path), (z_t, v)))
    with pytest.raises(ValueError, match="cubic"):
        S.interpolant(t, "cubic")


@pytest.mark.parametrize("path", PATHS)
def test_conversions(path):
    """velocity, data, noise and score are four names of one prediction: each is found again from each other."""
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    zn, eps = noise(7, 2, 3, 3), noise(7, 2, 3, 3, seed=1)
    z_t, v = S.interpolate(zn, eps, t, path)
    for a, b in zip(S.data_noise_from_velocity(v, z_t, t, path), (zn, eps)):
        assert torch.allclose(a, b)
    score = S.score_from_velocity(v, z_t, t, path)
    assert torch.allclose(score, -eps / S.interpolant(t, path)[1][:, None, None, None])
    for kind, value in (("data", zn), ("noise", eps), ("score", score)):
        assert torch.allclose(S.velocity_from(kind, value, z_t, t, path), v)


@pytest.mark.parametrize("path", PATHS)
def test_score_of_a_gaussian(path):
    """For data N(m, s^2) the score of z_t ~ N(alpha m, alpha^2 s^2 + sigma^2) follows from the expected velocity."""
    m, s, t = 1.5, 0.4, torch.linspace(0.05, 1, 20, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = S.interpolant(t, path)
    z, var = noise(20), alpha**2 * s**2 + sigma**2
    v = d_alpha * m + (d_alpha * alpha * s**2 + d_sigma * sigma) / var * (z - alpha * m)      # E[v | z_t = z]
    z_grad = z.clone().requires_grad_()
    log_p = torch.distributions.Normal(alpha * m, var.sqrt()).log_prob(z_grad)
    score, = torch.autograd.grad(log_p.sum(), z_grad)
    assert torch.allclose(S.score_from_velocity(v, z, t, path), score)


@pytest.mark.parametrize("path", PATHS)
def test_time_weighting(path):
    """lognormal means sigma / alpha = exp(N(0, 1)) on either path; float32 draws of 0 and almost 1 stay inside."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(S.time_from_uniform(u, "uniform", path), u)
    t = S.time_from_uniform(u, "lognormal", path)
    alpha, sigma, *_ = S.interpolant(t, path)
    assert torch.allclose((sigma / alpha).log(), torch.distributions.Normal(0.0, 1.0).icdf(u), atol=1e-5)
    ends = S.time_from_uniform(torch.tensor([0.0, 2**-24, 1 - 2**-24]), "lognormal", path)
    assert ends.dtype == torch.float32 and (0 < ends).all() and (ends < 1).all()


# ---- LatentNorm against nn.BatchNorm2d -----------------------------------------

def latents(seed, count=6):
    """Far from unit statistics: float32 sums of squares would not do."""
    return (noise(count, 3, 4, 4, seed=seed) * torch.tensor([0.1, 1, 5])[:, None, None] + 20).float()


def test_latent_norm_equals_batch_norm():
    """bn is BatchNorm2d in both modes: outputs, gradients, running statistics, momentum and counter over steps."""
    ours, theirs = S.LatentNorm(3), nn.BatchNorm2d(3, eps=1e-4, momentum=0.1, affine=False).double()
    assert list(ours.state_dict()) == list(theirs.state_dict()) and not list(ours.parameters())
    for step in range(4):
        z, weight = latents(step), noise(6, 3, 4, 4, seed=9)
        a, b = z.clone().requires_grad_(), z.double().requires_grad_()
        out, expected = ours.normalise_batch(a), theirs.train()(b)
        assert error(out, expected) < 1e-5
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        assert error(a.grad, b.grad) < 1e-5
        ours.commit(torch.tensor(True))
        for own, other in zip(ours.buffers(), theirs.buffers()):
            assert torch.allclose(own.double(), other.double(), rtol=1e-6)
        a, b = z.clone().requires_grad_(), z.double().requires_grad_()
        (ours(a) * weight).sum().backward()
        (theirs.eval()(b) * weight).sum().backward()
        assert error(ours(z), theirs(z.double())) < 1e-5 and error(a.grad, b.grad) < 1e-5
    assert ours.num_batches_tracked == 4


def test_commit_of_a_refused_step():
    """A step that is skipped leaves statistics and counter as they were, and nothing of it in the next one."""
    norm, other = S.LatentNorm(3), S.LatentNorm(3)
    before = [b.clone() for b in norm.buffers()]
    norm.normalise_batch(latents(0) * math.nan)
    norm(latents(1))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before))       # not before the commit, nor by forward
    norm.commit(torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before))
    for net in (norm, other):
        net.normalise_batch(latents(2))
        net.commit(torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), other.buffers()))


def test_micro_batches():
    """Accumulation: unequal micro-batches and one commit give the running statistics of the joint batch."""
    parts, whole = S.LatentNorm(3), S.LatentNorm(3)
    for z in (latents(0)[:4], latents(0)[4:]):
        parts.normalise_batch(z)
    whole.normalise_batch(latents(0))
    mean, var = parts.batch_statistics()
    assert torch.allclose(mean, latents(0).mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(var, latents(0).var((0, 2, 3)), rtol=1e-5)
    for net in (parts, whole):
        net.commit(torch.tensor(True))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(parts.buffers(), whole.buffers()))


def test_inverse_and_set():
    """inverse undoes forward with the same eps (at variances near eps that is half the value), from set statistics."""
    norm, var = S.LatentNorm(3), torch.tensor([1e-4, 1.0, 9.0])
    norm.num_batches_tracked += 5
    norm.load_stats(torch.tensor([1.0, -2.0, 0.0]), var)
    zn = noise(2, 3, 4, 4).float()
    assert torch.allclose(norm(norm.inverse(zn)), zn, atol=1e-4) and norm.num_batches_tracked == 0
    assert torch.allclose(norm.inverse(torch.ones(1, 3, 1, 1)).flatten() - norm.running_mean, (var + 1e-4).sqrt())
    assert norm(zn.bfloat16()).dtype == torch.bfloat16 and norm.inverse(zn.double()).dtype == torch.float64


def rank_of_two(rank, file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    norm, z = S.LatentNorm(3), latents(0)[3 * rank : 3 * rank + 3].requires_grad_()
    zn = norm.normalise_batch(z)
    (zn * noise(6, 3, 4, 4, seed=9)[3 * rank : 3 * rank + 3]).sum().backward()
    norm.commit(torch.tensor(True))
    torch.save((zn.detach(), z.grad, list(norm.buffers())), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    """Two gloo ranks normalise by, and commit, the joint statistics; a gradient flows through a rank's own share."""
    mp.spawn(rank_of_two, (tmp_path / "store", tmp_path), nprocs=2)
    (zn0, grad0, buffers0), (zn1, grad1, buffers1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    one = S.LatentNorm(3)
    assert error(torch.cat([zn0, zn1]), one.normalise_batch(latents(0))) < 1e-5
    one.commit(torch.tensor(True))
    for a, b, expected in zip(buffers0, buffers1, one.buffers()):
        assert torch.equal(a, b) and torch.allclose(a, expected, rtol=1e-6)
    for rank, grad in ((0, grad0), (1, grad1)):                     # the other rank's latents are a constant
        z = latents(0).double().requires_grad_()
        own = slice(3 * rank, 3 * rank + 3)
        zn = F.batch_norm(z, None, None, training=True, eps=1e-4)
        expected, = torch.autograd.grad((zn * noise(6, 3, 4, 4, seed=9))[own].sum(), z)
        assert error(grad, expected[own]) < 1e-5


# ---- SiT -----------------------------------------------------------------------

def test_counts():
    """SiT-XL/2 has the published number of parameters; pos_embed is a buffer: in checkpoints, in no optimizer."""
    with torch.device("meta"):
        net = S.SiT(S.SiTConfig(28, 1152, 16, 2))
    count = sum(p.numel() for p in net.parameters())
    assert count == 682_947_600 and count + net.pos_embed.numel() == 683_242_512
    assert "pos_embed" in net.state_dict() and "pos_embed" not in dict(net.named_parameters())
    names = """x_embedder.proj.weight t_embedder.mlp.2.bias y_embedder.embedding_table.weight blocks.27.attn.qkv.bias
        blocks.0.attn.proj.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.bias blocks.0.adaLN_modulation.1.weight
        final_layer.linear.weight final_layer.adaLN_modulation.1.bias projectors.0.4.bias bn.running_var"""
    assert set(names.split()) <= set(net.state_dict())
    assert net.pos_embed.shape[1] == 256


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_equals_timm(qk_norm):
    """Published weights mean the same here as in timm's Attention and Mlp: values and gradients of a block."""
    from timm.layers import Mlp
    from timm.models.vision_transformer import Attention
    width, heads = 24, 3
    ours = randomised(S.Block(width, heads, qk_norm)).double()
    attn = Attention(width, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm).double()
    mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh")).double()
    attn.load_state_dict(ours.attn.state_dict())
    mlp.load_state_dict(ours.mlp.state_dict())
    norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6).double()
    x, c, weight = noise(2, 5, width).requires_grad_(), noise(2, width, seed=1), noise(2, 5, width, seed=2)

    m = F.linear(F.silu(c), ours.adaLN_modulation[1].weight, ours.adaLN_modulation[1].bias)[:, None]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[..., k * width : (k + 1) * width] for k in range(6))
    h = x + gate_a * attn(norm(x) * (1 + scale_a) + shift_a)
    expected = h + gate_m * mlp(norm(h) * (1 + scale_m) + shift_m)
    assert error(ours(x, c), expected) < 1e-12
    a, b = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours(x, c), expected))
    assert error(a, b) < 1e-12


def test_fixed_embeddings():
    """Positions (column, then row; sines, then cosines) and timesteps (cosines, then sines) as in published weights."""
    dim, side = 16, 3
    table = S.sincos_2d(dim, side)[0]
    for row in range(side):
        for column in range(side):
            angles = [[p / 10000 ** (k / (dim / 4)) for k in range(dim // 4)] for p in (column, row)]
            expected = [f(a) for line in angles for f in (math.sin, math.cos) for a in line]
            assert torch.allclose(table[row * side + column], torch.tensor(expected))
    net = S.TimestepEmbedder(8)
    net.mlp = nn.Identity()
    expected = [[f(t * 10000 ** (-k / 128)) for f in (math.cos, math.sin) for k in range(128)] for t in (0.0, 0.3, 1.0)]
    assert torch.allclose(net(torch.tensor([0.0, 0.3, 1.0])), torch.tensor(expected), atol=1e-6)


def test_start():
    """adaLN-Zero: a new SiT predicts 0, its blocks are the identity, the rest starts as DiT's."""
    torch.manual_seed(0)
    net = S.SiT(S.SiTConfig(2, 96, 3, 2, size=8, teacher_dims=(6,), align_depth=1))
    z, t, y = noise(2, 4, 8, 8).float(), torch.tensor([0.1, 0.9]), torch.tensor([1, 2])
    v, _ = net(z, t, y)
    assert v.shape == z.shape and not v.any()
    x, c = noise(2, 16, 96, seed=1).float(), noise(2, 96, seed=2).float()
    assert all(torch.equal(block(x, c), x) for block in net.blocks)
    for weight, fan in ((net.x_embedder.proj.weight, 16 + 96), (net.blocks[0].attn.qkv.weight, 4 * 96)):
        assert 0.97 * math.sqrt(6 / fan) < weight.abs().max() <= math.sqrt(6 / fan)
    for layer in (net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        assert 0.019 < layer.weight.std() < 0.021
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def calls_of(net):
    """Every module of the network that is called from now on, by its name, in order."""
    calls = []
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("depth, calls", [(1, 1), (2, 4), (3, 5)])
def test_depth(depth, calls):
    """The VAE's step stops at `depth`: the full forward's tokens, no velocity, no later block."""
    net = randomised(S.SiT(TINY))
    z, t, y = noise(4, 4, 8, 8).float(), torch.linspace(0.1, 0.9, 4), torch.arange(4)
    _, tokens = net(z, t, y)
    seen = calls_of(net)
    v, early = net(z, t, y, depth=depth)
    order = ["blocks.0", "blocks.1", "projectors.0", "projectors.1", "blocks.2", "final_layer"]
    assert [name for name in seen if name in order] == order[:calls]
    assert v is None and len(tokens) == 2
    expected = tokens if depth >= TINY.align_depth else []
    assert all(torch.equal(a, b) for a, b in zip(early, expected, strict=True))


def test_gradient_of_the_tokens():
    """At align_depth the tokens carry the full forward's gradient to the latents: the VAE's."""
    net = randomised(S.SiT(TINY))
    t, y = torch.linspace(0.1, 0.9, 4), torch.arange(4)
    gradients = []
    for depth in (None, TINY.align_depth):
        z = noise(4, 4, 8, 8).float().requires_grad_()
        _, tokens = net(z, t, y, depth=depth)
        sum(f.square().sum() for f in tokens).backward()
        gradients.append(z.grad)
    assert gradients[0].any() and torch.equal(*gradients)


def test_tokens_of_align_depth():
    """align_depth counts blocks from 1; each teacher has its own projector of the same tokens."""
    net = randomised(S.SiT(TINY))
    z, t, y = noise(4, 4, 8, 8).float(), torch.linspace(0.1, 0.9, 4), torch.arange(4)
    seen = []
    net.blocks[TINY.align_depth - 1].register_forward_hook(lambda block, args, x: seen.append(x))
    _, tokens = net(z, t, y)
    assert [f.shape for f in tokens] == [(4, 16, 6), (4, 16, 10)]
    for project, f in zip(net.projectors, tokens, strict=True):
        assert torch.equal(project(seen[0]), f)


def test_dropped_labels():
    """drop makes a label the null class, num_classes, and leaves the other rows alone."""
    net = randomised(S.SiT(TINY))
    z, t, y = noise(4, 4, 8, 8).float(), torch.linspace(0.1, 0.9, 4), torch.arange(4)
    v, _ = net(z, t, y)
    drop = torch.tensor([True, False, True, False])
    dropped, tokens = net(z, t, y, drop)
    expected, expected_tokens = net(z, t, torch.tensor([5, 1, 5, 3]))
    assert torch.equal(dropped, expected)
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected_tokens, strict=True))
    assert torch.equal((dropped != v).flatten(1).any(1), drop)
    assert torch.equal(net(z, t, y, torch.zeros(4, dtype=torch.bool))[0], v)


@pytest.mark.parametrize("size, patch, grid", [(8, 2, 4), (8, 1, 8), (32, 2, 16), (16, 8, 2)])
def test_grid(size, patch, grid):
    """grid is the side of the square of tokens: teachers are asked for so many."""
    net = S.SiT(replace(TINY, size=size, patch=patch))
    _, tokens = net(torch.zeros(1, 4, size, size), torch.zeros(1), torch.tensor([0]))
    assert net.grid == grid and net.pos_embed.shape[1] == grid**2
    assert [f.shape for f in tokens] == [(1, grid**2, 6), (1, grid**2, 10)]


def test_patches():
    """Tokens run row by row; unpatchify puts (row in the patch, column, channel) back where x_embedder took it from."""
    net, p, n = S.SiT(TINY), 2, 4
    z = noise(2, 4, 8, 8).float()
    tokens = torch.stack([z[:, :, p * i : p * i + p, p * j : p * j + p].permute(0, 2, 3, 1).flatten(1)
                          for i in range(n) for j in range(n)], 1)
    assert torch.equal(net.unpatchify(tokens), z)
    weight = net.x_embedder.proj.weight.permute(0, 2, 3, 1).flatten(1)
    assert torch.allclose(net.x_embedder(z), F.linear(tokens, weight, net.x_embedder.proj.bias), atol=1e-5)


def test_parse_size():
    """--sit accepts the table's names and any depth-width-heads/patch; anything else is one line that says what is."""
    assert S.parse_size("SiT-XL/2") == S.parse_size("XL/2") == (28, 1152, 16, 2)
    assert S.parse_size("6-192-3/8") == (6, 192, 3, 8)
    assert [S.parse_size(f"SiT-{name}/1")[:3] for name in "SBL"] == [(12, 384, 6), (12, 768, 12), (24, 1024, 16)]
    for name in ("SiT-XXL/2", "SiT-B/3", "SiT-B", "", "6-192/2", "6-192-3/", "6-192-3-x/2", "6--192-3/2", "SiT-B/²"):
        with pytest.raises(ValueError, match="expected SiT-S, -B, -L or -XL") as caught:
            S.parse_size(name)
        assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
    for name in ("6-100-3/2", "6-18-3/2", "0-192-3/2"):
        with pytest.raises(ValueError, match="multiple"):
            S.parse_size(name)


# ---- Loading -------------------------------------------------------------------
# PLAIN has heads of 64 channels, as every published SiT but XL.

PLAIN = S.SiTConfig(depth=3, width=128, heads=2, patch=2, channels=4, size=8, num_classes=5, teacher_dims=(6, 10),
                    align_depth=2, projector_width=16)


def loaded(file):
    """A published checkpoint -> the network, strictly."""
    cfg, state = published_sit(file)
    net = S.SiT(cfg)
    net.load_state_dict(state)
    return net


class OfWillisma(nn.Module):
    """SiT as willisma/SiT computes it, by its paper: t = 1 is data, the output has 2C channels, the first C count."""

    def __init__(self, depth, width, heads, patch, channels, side, classes):
        super().__init__()
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention, PatchEmbed
        self.channels = channels
        self.x_embedder = PatchEmbed(side, patch, channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2, width))
        self.t_embedder, self.y_embedder, self.final_layer = nn.Module(), nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.attn = Attention(width, heads, qkv_bias=True)
            block.mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh"))
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.blocks.append(block)
        self.final_layer.linear = nn.Linear(width, patch * patch * 2 * channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, z, t, y):
        def norm(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = self.x_embedder(z) + self.pos_embed
        angles = [[time * 10000 ** (-k / 128) for k in range(128)] for time in t.tolist()]
        waves = torch.tensor([[f(a) for f in (math.cos, math.sin) for a in line] for line in angles], dtype=z.dtype)
        c = self.t_embedder.mlp(waves) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            shift, scale, gate, shift_m, scale_m, gate_m = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            x = x + gate * block.attn(norm(x, shift, scale))
            x = x + gate_m * block.mlp(norm(x, shift_m, scale_m))
        x = self.final_layer.linear(norm(x, *self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)))
        n, p = round(x.shape[1] ** 0.5), self.x_embedder.patch_size[0]
        image = torch.einsum("bhwpqc->bchpwq", x.view(len(x), n, n, p, p, 2 * self.channels))
        return image.reshape(len(x), 2 * self.channels, n * p, n * p)[:, : self.channels]


@pytest.mark.parametrize("patch", [2, 1])
def test_published_sit_of_willisma(patch):
    """Its time and sign are reversed, the unused channels dropped: ours(z, t) = -theirs(z, 1 - t), a SiT like any."""
    theirs = randomised(OfWillisma(2, 128, 2, patch, 4, 8, 5), 0.05)
    state, z, y = theirs.state_dict(), noise(4, 4, 8, 8), torch.arange(4)
    theirs.double()
    for file in (state, {"ema": state, "args": Namespace(path_type="Linear", prediction="velocity")}):
        net = loaded(file)
        assert net.cfg == replace(PLAIN, depth=2, patch=patch, teacher_dims=(), align_depth=4, projector_width=2048)
        for t in (0.0, 0.04, 0.3, 0.77, 1.0):
            time = torch.full((4,), t, dtype=torch.float64)
            with torch.no_grad():
                ours, reference = net(z.float(), time.float(), y)[0], -theirs(z, 1 - time, y)
            assert error(ours, reference) < 3e-6


@pytest.mark.parametrize("qk_norm", [False, True])
def test_published_sit_of_repa_e(qk_norm):
    """Architecture from the shapes, all weights and bn as they stand, the trained pos_embed too; args tell the rest."""
    cfg = replace(PLAIN, patch=1, channels=8, qk_norm=qk_norm)
    net = randomised(S.SiT(cfg))
    net.pos_embed += noise(*net.pos_embed.shape).float()
    net.bn.load_stats(noise(8).float(), noise(8, seed=1).float() ** 2)
    for args, expected in (({}, replace(cfg, align_depth=4)),
                           ({"args": Namespace(encoder_depth=3, path_type="cosine", model="SiT-XL/1", prediction="v")},
                            replace(cfg, align_depth=3, path="cosine"))):
        again = loaded({"ema": net.state_dict(), "model": None, "steps": 7} | args)
        assert again.cfg == expected
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", S.SIZES)
def test_published_sizes(name):
    """The four sizes are found from their shapes alone, heads and depth of the alignment included."""
    depth, width, heads = S.SIZES[name]
    cfg = S.SiTConfig(depth, width, heads, align_depth=4 if name in "SB" else 8)
    with torch.device("meta"):
        assert published_sit(S.SiT(cfg).state_dict())[0] == cfg


def test_published_sit_of_repa():
    """REPA's: no bn, zn = 0.18215 z; older files call the blocks behind the projectors decoder_blocks."""
    net = randomised(S.SiT(PLAIN))
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("bn.")}
    older = {key.replace("blocks.2.", "decoder_blocks.0."): value for key, value in state.items()}
    z, t, y = noise(3, 4, 8, 8).float(), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)
    for file, align_depth in ((state, 4), (older, 2), ({"ema": older}, 2)):
        again = loaded(file)
        assert again.cfg == replace(PLAIN, align_depth=align_depth)
        assert torch.equal(again(z, t, y)[0], net(z, t, y)[0])
        assert error(again.bn(z), 0.18215 * z) < 1e-6 and error(again.bn.inverse(0.18215 * z), z) < 1e-6
    tokens, expected = loaded(older)(z, t, y)[1], net(z, t, y)[1]
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
    assert "decoder_blocks.0.attn.qkv.weight" in older              # what was given is left as it was
    with pytest.raises(RuntimeError, match="bn.running_var"):       # 0.18215 is known of SD-VAE's four channels alone
        loaded({k: v for k, v in S.SiT(replace(PLAIN, channels=8)).state_dict().items() if not k.startswith("bn.")})


NO_SIT = {       # kind: (what is in the file, what its line says)
    "a list": ([1], "cannot read"),
    "no names": ({1: 2}, "holds 1, expected a network with x_embedder"),
    "no weights": ({"ema": None}, "holds ema, expected"),
    "a VAE's": ({"encoder.conv_in.weight": 1}, "x_embedder"),
    "a number": ({"pos_embed": 3}, "cannot read"),
    "a weight missing": ({"blocks.1.attn.qkv.weight": None}, "blocks.1.attn.qkv.weight"),
    "a weight of other dimensions": ({"x_embedder.proj.weight": torch.zeros(3)}, "cannot read"),
    "a weight too many": ({"blocks.0.extra": torch.zeros(3)}, "blocks.0.extra"),
    "a weight of another shape": ({"blocks.0.mlp.fc1.bias": torch.zeros(3)}, "mlp.fc1.bias"),
}


@pytest.mark.parametrize("kind", NO_SIT)
def test_files_that_are_no_sit(tmp_path, kind):
    """One line that names the file, and the weight where it is one."""
    content, word = NO_SIT[kind]
    if kind.startswith(("a number", "a weight")):
        content = S.SiT(PLAIN).state_dict() | content
        content = {key: value for key, value in content.items() if value is not None}
    refused(tmp_path / "x.pt", content, word)


@pytest.mark.parametrize("args, message", [
    (dict(path_type="GVP"), "path gvp, .*expected linear or cosine"),
    (dict(prediction="noise"), "prediction noise: expected linear or cosine, v")])
def test_sits_of_another_kind(tmp_path, args, message):
    """A SiT on another interpolant, or one that predicts noise, would load, and sample rubbish."""
    content = {"ema": S.SiT(PLAIN).state_dict(), "args": Namespace(**args)}
    refused(tmp_path / "x.pt", content, message)


def refused(path, content, message):
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(path, vae="not-read.pt")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "not-read.pt" not in str(caught.value)

"""Pixels and latents: the VAE against diffusers, the losses against their definitions, and the files users bring.

    python -m pytest tests/test_vae.py
"""
import copy
import math
import os
import pickle
import socket
from argparse import Namespace
from dataclasses import asdict, replace

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from diffusers import AutoencoderKL
from PIL import Image

import sample as S
import train
import vae as V

SMALL = V.VAEConfig(z_channels=3, ch=32, ch_mult=(1, 2), num_res_blocks=1)      # 32 groups, as every published VAE


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    """The largest difference, relative to the reference's largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def one_line(error, *words):
    """A message for users: one line that holds these words."""
    assert "\n" not in str(error.value) and all(str(word) in str(error.value) for word in words), error.value


def image(height, width, seed=0, mode="RGB"):
    """A picture of smooth random colours, so that JPEG and resizing keep it."""
    pixels = F.interpolate(noise(1, 3, 4, 4, seed=seed), (height, width), mode="bicubic")[0] * 60 + 128
    return Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()).convert(mode)


# ---- The autoencoder against diffusers -----------------------------------------

BLOCKS = ((".down.", ".down_blocks."), (".up.", ".up_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
          (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
          (".mid.attn_1.", ".mid_block.attentions.0."), ("nin_shortcut", "conv_shortcut"),
          ("downsample.", "downsamplers.0."), ("upsample.", "upsamplers.0."), ("norm_out.", "conv_norm_out."))
ATTENTION = ((".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
             (".proj_out.", ".to_out.0."))


def diffusers_name(key, levels):
    """latent-diffusion's name -> diffusers'."""
    part, *rest = key.split(".")
    if rest[0] == "up":
        rest[1] = str(levels - 1 - int(rest[1]))
    key = ".".join([part, *rest])
    for ours, theirs in BLOCKS + (ATTENTION if "attn" in key else ()):
        key = key.replace(ours, theirs)
    return key


def reference(cfg):
    """diffusers' AutoencoderKL of this configuration; all weights random, also those that start as 0 or 1."""
    last = "AttnDownEncoderBlock2D" if cfg.attn_last else "DownEncoderBlock2D"
    down = ["DownEncoderBlock2D"] * (len(cfg.ch_mult) - 1) + [last]
    net = AutoencoderKL(block_out_channels=[cfg.ch * m for m in cfg.ch_mult], layers_per_block=cfg.num_res_blocks,
                        latent_channels=cfg.z_channels, norm_num_groups=32, down_block_types=down,
                        up_block_types=[name.replace("DownEncoder", "UpDecoder") for name in reversed(down)],
                        use_quant_conv=cfg.quant_conv, use_post_quant_conv=cfg.quant_conv)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p += 0.1 * p.std() * noise(*p.shape, seed=i) if p.dim() > 1 else 0.1 * noise(*p.shape, seed=i)
    return net


@pytest.mark.parametrize("name, count", [("f8d4", 83_653_863), ("f16d32", 69_836_067), ("f8d16", 83_819_683)])
def test_vae_equals_diffusers(name, count):
    """Published VAEs give their own latents, pictures and gradients; an oblong picture shows swapped axes."""
    torch.manual_seed(0)
    cfg = V.VAES[name]
    ours, theirs = V.VAE(cfg), reference(cfg)
    names = {key: diffusers_name(key, len(cfg.ch_mult)) for key in ours.state_dict()}
    weights = theirs.state_dict()
    assert set(names.values()) == set(weights) and sum(p.numel() for p in ours.parameters()) == count
    own = ours.state_dict()
    ours.load_state_dict({key: weights[names[key]].reshape(v.shape) for key, v in own.items()})

    side = 4 * cfg.downsampling
    x, eps = noise(1, 3, side, side // 2).clamp(-1, 1), noise(1, cfg.z_channels, 4, 2)
    weight = noise(*x.shape, seed=1)

    def compare(dtype):
        x_ours, x_theirs = (x.to(dtype, copy=True).requires_grad_() for _ in range(2))
        z, rec, mean, logvar = ours(x_ours, eps.to(dtype)) if dtype == torch.float32 else exact(x_ours)
        posterior = theirs.encode(x_theirs).latent_dist
        z_theirs = posterior.mean + posterior.std * eps.to(dtype)
        rec_theirs = theirs.decode(z_theirs).sample
        ((rec * weight).sum() + V.kl_divergence(mean, logvar)).backward()
        ((rec_theirs * weight).sum() + posterior.kl().mean()).backward()
        for a, b in ((mean, posterior.mean), (logvar, posterior.logvar), (z, z_theirs), (rec, rec_theirs),
                     (x_ours.grad, x_theirs.grad)):
            assert error(a, b) < 1e-5

    def exact(x):
        """forward without its conversions to float32."""
        mean, logvar = (ours.quant_conv(ours.encoder(x)) if cfg.quant_conv else ours.encoder(x)).chunk(2, 1)
        z = ours.sample(mean, logvar, eps.double())
        return z, ours.decode(z), mean, logvar

    compare(torch.float32)
    for net in (ours, theirs):
        net.zero_grad()
        net.double()
    compare(torch.float64)      # in float32 the sums over positions in a bias's gradient cancel to 1.5e-5 of noise
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        if not key.endswith(".k.bias"):                 # softmax ignores it: its gradient is rounding error
            assert error(p.grad, grads[names[key]].reshape(p.shape)) < 1e-9, key


def test_recomputing_activations_keeps_the_bits():
    """--recompute keeps less memory between forward and backward; losses and gradients are the same bits."""
    torch.manual_seed(0)
    vae, results = V.VAE(replace(SMALL, ch_mult=(1, 1, 2))), []
    with torch.no_grad():
        for i, p in enumerate(vae.parameters()):        # its residual branches start as zeros
            p += 0.05 * noise(*p.shape, seed=i)
    for levels in range(4):
        for i, level in enumerate(zip(vae.encoder.down, vae.decoder.up)):
            for side in level:
                side.recompute = i < levels
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        vae.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            z, rec, mean, logvar = vae(noise(2, 3, 32, 32), noise(2, 3, 8, 8, seed=1))
            loss = rec.square().mean() + z.square().mean() + V.kl_divergence(mean, logvar)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in vae.parameters()], sum(kept.values())))
    for loss, grads, _ in results[1:]:
        assert torch.equal(loss, results[0][0]) and all(map(torch.equal, grads, results[0][1]))
    sizes = [size for _, _, size in results]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * sizes[2] > sizes[3], sizes


# ---- Posterior, losses, discriminator ------------------------------------------

def test_posterior():
    """z, KL, the clamp of logvar and the fixed sigma are those of torch.distributions' Normal."""
    mean, logvar, eps = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), noise(3, 4, 2, 2, seed=2)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    assert torch.allclose(V.VAE.sample(mean, logvar, eps), normal.icdf(torch.special.ndtr(eps)), atol=1e-4)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    assert torch.allclose(V.kl_divergence(mean, logvar), kl)

    net = V.VAE(SMALL)
    with torch.no_grad():
        net.quant_conv.weight.zero_()
        net.quant_conv.bias[:] = torch.tensor([1.0, 2, 3, -99, 0.5, 99])
        mean, logvar = net.encode(noise(1, 3, 8, 8))
    assert mean[0, :, 0, 0].tolist() == [1, 2, 3] and logvar[0, :, 0, 0].tolist() == [-30, 0.5, 20]
    fixed = V.VAE(replace(SMALL, sigma=0.2))
    z, _, mean, logvar = fixed(noise(1, 3, 8, 8), torch.ones(1, 3, 4, 4))
    assert torch.allclose(z - mean, torch.full_like(z, 0.2)) and torch.allclose(logvar.exp(), torch.full_like(z, 0.04))


def test_ranges():
    """All 256 levels survive the trip to [-1, 1] and back; to_uint8 rounds to the nearest level and clips."""
    levels = torch.arange(256).to(torch.uint8)
    x = V.to_float(levels)
    assert x.min() == -1 and x.max() == 1 and torch.equal(V.to_uint8(x), levels)
    near = torch.linspace(-1.2, 1.2, 1001, dtype=torch.float64)
    expected = np.clip(np.floor((near.numpy() + 1) * 127.5 + 0.5), 0, 255)
    off_ties = np.abs((near.numpy() + 1) * 127.5 % 1 - 0.5) > 1e-3
    assert (V.to_uint8(near).numpy() == expected)[off_ties].all() and off_ties.mean() > 0.99


def test_hinge_and_reconstruction():
    """GAN and pixel losses are their formulas; a discriminator that is sure has no loss."""
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert V.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 2) / 3 + 0.5 * (1 + 2) / 3)
    assert V.discriminator_loss(real.abs() + 1, -real.abs() - 1).item() == 0
    assert V.generator_loss(fake).item() == pytest.approx(2 / 3)
    x, rec = torch.zeros(1, 3, 1, 2), torch.tensor([0.5, -1.0]).expand(1, 3, 1, 2)
    assert V.reconstruction_loss(x, rec).item() == 0.75 and V.reconstruction_loss(x, rec, "l2").item() == 0.625


def test_adaptive_gan_weight():
    """LDM's weight is the ratio of both gradients' norms at the last layer, is clamped, and carries no gradient."""
    h, layer = noise(5, 3), noise(2, 3, seed=1).requires_grad_()
    rec = h @ layer.T
    nll, gan = rec.square().sum(), (3 * rec).sum()
    d_nll, d_gan = 2 * rec.detach().T @ h, 3 * torch.ones(2, 5) @ h
    weight = V.adaptive_gan_weight(nll, gan, layer)
    assert torch.allclose(weight, d_nll.norm() / (d_gan.norm() + 1e-4)) and not weight.requires_grad
    assert V.adaptive_gan_weight(nll * 1e9, gan * 0, layer) == 1e4
    (nll + weight * gan).backward()                                 # both graphs are still there
    assert torch.allclose(layer.grad, d_nll + weight * d_gan)


def test_discriminator():
    """The authors' discriminator checkpoint loads (names, shapes), a new one starts from their distribution."""
    torch.manual_seed(0)
    net = V.Discriminator()
    shapes = {key: tuple(v.shape) for key, v in net.state_dict().items() if v.dim()}
    convs = {0: (64, 3), 2: (128, 64), 5: (256, 128), 8: (512, 256), 11: (1, 512)}
    expected = {f"main.{i}.weight": (*c, 4, 4) for i, c in convs.items()} | {"main.0.bias": (64,), "main.11.bias": (1,)}
    for i, c in ((3, 128), (6, 256), (9, 512)):
        expected |= {f"main.{i}.{name}": (c,) for name in ("weight", "bias", "running_mean", "running_var")}
    assert shapes == expected and net(noise(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    for i, (c_out, c_in) in convs.items():
        weight, n = net.main[i].weight, 16 * c_out * c_in
        assert abs(weight.mean()) < 4 * 0.02 / n**0.5 and abs(weight.std() / 0.02 - 1) < 4 / (2 * n) ** 0.5
    for i in (3, 6, 9):
        assert abs(net.main[i].weight.mean() - 1) < 0.01 and 0.015 < net.main[i].weight.std() < 0.025
        assert not net.main[i].bias.any()
    strides = [m.stride[0] for m in net.main if isinstance(m, torch.nn.Conv2d)]
    slopes = {m.negative_slope for m in net.main if isinstance(m, torch.nn.LeakyReLU)}
    assert strides == [2, 2, 2, 1, 1] and slopes == {0.2}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A TORCH_HOME with random VGG16 weights; the classifier, which LPIPS never uses, is one zero seen many times."""
    home = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], False)
    state = {f"features.{key}": v for key, v in layers.state_dict().items()}
    for i, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):
        state |= {f"classifier.{i}.weight": torch.zeros(1).expand(shape), f"classifier.{i}.bias": torch.zeros(shape[0])}
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, home / "hub/checkpoints/vgg16-397923af.pth")
    return home


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_is_doubling_and_a_convolution(layout):
    """The transposed convolution with the summed kernel: values and all gradients, in float64, of an odd side."""
    ours = V.Upsample(6).double().to(memory_format=layout)
    x = noise(2, 6, 5, 7).double().contiguous(memory_format=layout).requires_grad_()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), ours.conv.weight, ours.conv.bias, padding=1)
    wanted, seed = [x, *ours.parameters()], noise(*expected.shape, seed=1).double()
    assert torch.allclose(ours(x), expected, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours(x), wanted, seed), torch.autograd.grad(expected, wanted, seed)):
        assert torch.allclose(a, b, atol=1e-12)


def test_compiled_vae_equals_eager():
    """Levels, up- and downsampling, and activations computed again, under torch.compile: values and gradients."""
    torch.manual_seed(0)
    eager = V.VAE(V.VAEConfig(ch=16, ch_mult=(1, 2), num_res_blocks=1, groups=4)).to(memory_format=torch.channels_last)
    compiled, (x, eps) = copy.deepcopy(eager), (noise(2, 3, 16, 16), noise(2, 4, 8, 8))
    compiled.encoder.down[0].recompute = compiled.decoder.up[0].recompute = True
    for net, forward in ((eager, eager), (compiled, torch.compile(compiled, dynamic=False, fullgraph=True))):
        z, rec, _, _ = forward(x, eps)
        (rec.square().mean() + z.square().mean()).backward()
    for a, b in zip([rec, *(p.grad for p in compiled.parameters())],
                    [eager(x, eps)[1], *(p.grad for p in eager.parameters())]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_lpips_equals_the_package(vgg, monkeypatch):
    """LPIPS is the package's own number, on images in [-1, 1] used once; only rec gets a gradient, and never NaN."""
    monkeypatch.setenv("TORCH_HOME", str(vgg))
    ours, theirs = V.LPIPS(), lpips.LPIPS(net="vgg", verbose=False).eval()
    x, rec = (noise(2, 3, 32, 32, seed=k).clamp(-1, 1).requires_grad_() for k in (0, 1))
    loss, expected = ours(x, rec), theirs(x, rec).mean()
    assert error(loss, expected) < 1e-5 and loss.item() > 0
    gradient, = torch.autograd.grad(expected, rec)
    loss.backward()
    assert x.grad is None and error(rec.grad, gradient) < 1e-4 and all(p.grad is None for p in ours.parameters())
    ours.legacy_range = True                                        # the authors' first release: 2x - 1 twice
    assert error(ours(x, rec), theirs(2 * x - 1, 2 * rec - 1).mean()) < 1e-5 and error(ours(x, rec), expected) > 1e-3
    ours.legacy_range = False

    class Bare(torch.nn.Module):                                    # the image as its own feature map
        def forward(self, x):
            return [x]
    ours.net.scaling_layer, ours.net.net = torch.nn.Identity(), Bare()
    black = torch.zeros(1, 3, 2, 2, requires_grad=True)
    gradient, = torch.autograd.grad(lpips.normalize_tensor(black).sum(), black)
    assert gradient.isnan().all()                                   # the package's square root
    gradient, = torch.autograd.grad(ours.features(black)[0].sum(), black)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("content", [None, b"", b"no weights", b"PK\x03\x04 cut"])
def test_missing_vgg(tmp_path, monkeypatch, content):
    """Without network, or with a broken file, one line says which file goes where."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    if content is not None:
        (tmp_path / "hub/checkpoints").mkdir(parents=True)
        (tmp_path / "hub/checkpoints/vgg16-397923af.pth").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        V.LPIPS()
    one_line(caught, "vgg16-397923af.pth", tmp_path / "hub/checkpoints", "--lpips=0")


def no_network(*_, **__):
    raise OSError("no network")


# ---- Loading -------------------------------------------------------------------

def beside(path, mean, std, disc):
    torch.save({"latents_bias": mean.view(1, -1, 1, 1), "latents_scale": 1 / std.view(1, -1, 1, 1)},
               f"{path}-latents-stats.pt")
    torch.save(disc, f"{path}-discriminator-ckpt.pt")


@pytest.mark.parametrize("wrapped", [False, True])
def test_load_vae(tmp_path, wrapped):
    """A file of weights gives the VAE bit by bit, its shape guessed; statistics (as variances) and D from beside it."""
    vae, mean, std = V.VAE(SMALL), torch.tensor([1.0, -2.0, 0.1]), torch.tensor([0.5, 2.0, 3.0])
    state, path = vae.state_dict(), tmp_path / "vae.pt"
    torch.save({"state_dict": state, "args": Namespace(lr=1e-4)} if wrapped else state, path)
    loaded, stats, disc = S.load_vae(str(path))
    assert loaded.cfg == SMALL and stats is None and disc is None
    assert all(torch.equal(v, state[key]) for key, v in loaded.state_dict().items())
    beside(tmp_path / "vae", mean, std, {"main.0.weight": mean})
    _, stats, disc = S.load_vae(str(path))
    assert torch.allclose(stats[0], mean) and torch.allclose(stats[1], std**2)
    assert torch.equal(disc["main.0.weight"], mean)


def test_statistics_of_other_latents(tmp_path):
    """Statistics of another number of channels are another VAE's: refused where they are read."""
    path = tmp_path / "vae.pt"
    torch.save(V.VAE(SMALL).state_dict(), path)
    for channels in (1, 2, 4):
        beside(tmp_path / "vae", torch.zeros(channels), torch.ones(channels), {})
        with pytest.raises(ValueError) as caught:
            S.load_vae(str(path))
        one_line(caught, "vae.pt", "latents' statistics", f"[{channels}], expected 3 floats")


def test_a_discriminator_of_another_kind(tmp_path):
    """A file beside the VAE that is no discriminator like the authors': one line when a run
    starts."""
    beside(tmp_path / "vae", torch.zeros(3), torch.ones(3), {"other": torch.zeros(3)})
    torch.save(V.VAE(SMALL).state_dict(), tmp_path / "vae.pt")
    cfg = train.Config(data="tiny", resolution=32, vae=str(tmp_path / "vae.pt"), method="vae",
                       lpips=0)
    with pytest.raises(ValueError) as caught:
        train.build(cfg, V.Shapes(), None, 1, torch.device("cpu"))
    one_line(caught, "vae.pt", "main.0.weight", "a discriminator like the authors'")


def test_load_vae_from_our_checkpoint(tmp_path):
    """A run's folder gives its newest snapshot's VAE (the averaged one, if any), bn's statistics
    and the discriminator."""
    old, new, mean, var = V.VAE(SMALL), V.VAE(SMALL), torch.arange(3.0), torch.arange(1.0, 4)
    file = {"vae_config": asdict(SMALL), "vae": old.state_dict(), "discriminator": {"main.0.bias": mean},
            "ema": {"bn.running_mean": mean, "bn.running_var": var}}
    torch.save(file, tmp_path / "step_0000009.pt")
    torch.save(file | {"vae_ema": new.state_dict()}, tmp_path / "step_0000010.pt")
    for name in ("state.pt", "state.prev.pt", "step_0000011.tmp", "notes.txt"):
        (tmp_path / name).write_text("")
    for path, vae in ((tmp_path, new), (tmp_path / "step_0000009.pt", old)):
        loaded, stats, disc = S.load_vae(str(path))
        assert torch.equal(loaded.encoder.conv_in.weight, vae.encoder.conv_in.weight) and loaded.cfg == SMALL
        assert torch.equal(stats[0], mean) and torch.equal(stats[1], var) and torch.equal(disc["main.0.bias"], mean)
    assert S.find_checkpoint(tmp_path).name == "step_0000010.pt"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/state.tmp").write_text("")
    with pytest.raises(ValueError, match="no checkpoint"):
        S.find_checkpoint(tmp_path / "empty")


def test_find_checkpoint_without_snapshots(tmp_path):
    """Before a run's first snapshot its folder stands for state.pt, and without that (a kill while
    it was written) for state.prev.pt."""
    vaes = {}
    for name in ("state.prev.pt", "state.pt", "step_0000001.pt"):
        vaes[name] = V.VAE(SMALL)
        torch.save({"vae_config": asdict(SMALL), "vae": vaes[name].state_dict()}, tmp_path / name)
        assert S.find_checkpoint(tmp_path) == tmp_path / name
        found = S.load_vae(str(tmp_path))[0].encoder.conv_in.weight
        assert torch.equal(found, vaes[name].encoder.conv_in.weight)
    (tmp_path / "step_0000001.pt").unlink()
    (tmp_path / "state.prev.pt").unlink()
    assert S.find_checkpoint(str(tmp_path)) == tmp_path / "state.pt"


def test_guess_config():
    """Published files carry no configuration: it is read off the shapes, for every published architecture."""
    for name in ("f8d4", "f16d32", "f8d16"):
        with torch.device("meta"):
            state = V.VAE(V.VAES[name]).state_dict()
        assert S.guess(state) == V.VAES[name]


def test_published_names_download_three_files(tmp_path, monkeypatch):
    """--vae=invae fetches three files once, the weights last; without network one line says what goes where."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ValueError) as caught:
        S.load_vae("invae")
    folder = tmp_path / "hub/checkpoints/REPA-E--invae"
    one_line(caught, "huggingface.co/REPA-E/invae", folder / "invae-f16d32-latents-stats.pt")
    urls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: (urls.append(url), torch.save({}, path)))
    for _ in range(2):
        assert S.find_checkpoint("invae") == folder / "invae-f16d32.pt"
    assert [url.removeprefix("https://huggingface.co/REPA-E/invae/resolve/main/") for url in urls] == [
        "invae-f16d32-latents-stats.pt", "invae-f16d32-discriminator-ckpt.pt", "invae-f16d32.pt"]
    urls.clear()
    assert S.find_checkpoint("hf:REPA-E/sit-repae-invae/checkpoints/0400000.pt").name == "0400000.pt"
    assert S.find_checkpoint("hf:black-forest-labs/FLUX.1-dev/vae").parent.name == "vae"
    assert [url.removeprefix("https://huggingface.co/") for url in urls] == [
        "REPA-E/sit-repae-invae/resolve/main/checkpoints/0400000.pt",
        "black-forest-labs/FLUX.1-dev/resolve/main/vae/config.json",
        "black-forest-labs/FLUX.1-dev/resolve/main/vae/diffusion_pytorch_model.safetensors"]


def test_wrong_keys_are_named(tmp_path):
    """Weights of another network are refused by the names that are missing, too many or misshapen;
    a configuration by the field that is unknown."""
    state, path = V.VAE(SMALL).state_dict(), tmp_path / "a.pt"
    key = "decoder.conv_out.bias"
    short = {name: value for name, value in state.items() if name != key}
    for content in (short, state | {"decoder.more": torch.zeros(1)}, state | {key: torch.zeros(4)}):
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            S.load_vae(str(path))
        one_line(caught, path, "decoder.more" if len(content) > len(state) else key)
    torch.save({"vae": state, "vae_config": asdict(SMALL) | {"depth": 3}}, path)
    with pytest.raises(ValueError) as caught:
        S.load_vae(str(path))
    one_line(caught, path, "VAEConfig", "depth")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_bad_files(tmp_path):
    """Missing, cut, foreign and malicious files are refused in one line that names them; nothing in them runs."""
    good, marker, path = tmp_path / "good.pt", tmp_path / "executed", tmp_path / "bad.pt"
    torch.save(V.VAE(SMALL).state_dict(), good)
    whole = good.read_bytes()
    torch.save({"encoder": Malicious(marker)}, tmp_path / "malicious.pt")
    files = [whole[: len(whole) * k // 7] for k in range(7)] + [
        b"hello\n", b"\x80", b"PK\x03\x04", pickle.dumps(Malicious(marker)), (tmp_path / "malicious.pt").read_bytes()]
    for content in files:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            S.load_vae(str(path))
        one_line(caught, path)
    for content in ({"a": torch.zeros(1)}, {"state_dict": torch.zeros(2)}, [1, 2], torch.zeros(2), {"vae_config": {}},
                    {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}):
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            S.load_vae(str(path))
        one_line(caught)
    with pytest.raises(ValueError) as caught:
        S.load_vae(str(tmp_path / "absent.pt"))
    one_line(caught, "absent.pt")
    assert not marker.exists()


def test_a_flipped_bit(tmp_path):
    """torch.load looks at no checksum: one wrong bit anywhere in the weights is refused here."""
    path = tmp_path / "vae.pt"
    torch.save(V.VAE(SMALL).state_dict(), path)
    whole = path.read_bytes()
    for k in range(1, 8):
        raw = bytearray(whole)
        raw[len(raw) * k // 8] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ValueError) as caught:
            S.load_vae(str(path))
        one_line(caught, path)
    path.write_bytes(whole)
    assert V.load_pt(path).keys() == V.VAE(SMALL).state_dict().keys()


# ---- Images --------------------------------------------------------------------

def test_center_crop():
    """ADM's crop, on which every FID rests: identity at R, BOX when halving, the middle of what is longer."""
    def crop(picture, side):
        return V.center_crop(picture, side).permute(1, 2, 0).numpy()
    picture = image(32, 32)
    assert (crop(picture, 32) == np.asarray(picture)).all()
    pixels = np.asarray(image(64, 64)).astype(float)
    halved = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(crop(image(64, 64), 32) - halved).max() <= 1      # PIL rounds after each of the two directions
    wide = image(32, 49)
    assert (crop(wide, 32) == np.asarray(wide)[:, 8:40]).all()
    assert (crop(wide.transpose(Image.TRANSPOSE), 32) == np.asarray(wide)[:, 8:40].transpose(1, 0, 2)).all()
    odd = image(75, 131)                                            # halved once (37 x 65), then BICUBIC to 32 x 56
    small = odd.resize((65, 37), Image.BOX).resize((56, 32), Image.BICUBIC)
    assert (crop(odd, 32) == np.asarray(small)[:, 12:44]).all()
    for size in ((1, 1), (1, 70), (31, 33), (33, 31), (200, 63), (64, 63)):
        assert V.center_crop(image(*size), 32).shape == (3, 32, 32)


def test_folder(tmp_path):
    """Real folders: every format and mode gives the same picture in RGB; classes are sorted folder names."""
    picture, grey = image(65, 47), image(65, 47, mode="L")
    for name in ("b dog", "a cat"):
        (tmp_path / name).mkdir()
    cat, dog = tmp_path / "a cat", tmp_path / "b dog"
    picture.save(cat / "0.png")
    picture.save(cat / "1.JPEG", quality=95)
    picture.convert("CMYK").save(cat / "2.jpg", quality=95)
    rgba = picture.convert("RGBA")
    rgba.putalpha(7)
    rgba.save(cat / "3.png")
    picture.save(cat / "4.webp", lossless=True)
    (cat / "notes.txt").write_text("not an image")
    grey.save(dog / "0.jpg", quality=95)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(dog / "1.png")
    grey.save(dog / "2.bmp")

    data = V.open_images(str(tmp_path), 32)
    assert data.classes == ["a cat", "b dog"] and len(data) == 8
    images, labels = V.fetch(data, range(8))
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 32, 32)
    assert labels.tolist() == data.labels.tolist() == [0] * 5 + [1] * 3
    for i, other in enumerate(images):
        expected = V.center_crop(picture if i < 5 else grey, 32)
        if i == 3:                                                      # on white
            expected = 255 - (255 - expected.float()) * 7 / 255
        limit = 0.01 if i in (0, 4, 6, 7) else 3                    # JPEG loses a little
        assert (other.int() - expected.int()).abs().float().mean() < limit, data.samples[i]
    again, labels = V.fetch(data, [6, 0])
    assert torch.equal(again, images[[6, 0]]) and labels.tolist() == [1, 0]


def test_folders_without_classes(tmp_path):
    """Images without class folders are one class; with no resolution they keep their own."""
    image(8, 12).save(tmp_path / "loose.png")
    loose = V.Folder(tmp_path)
    assert loose.classes == [tmp_path.name] and loose.resolution == 8
    assert V.fetch(loose, [0])[0].shape == (1, 3, 8, 8) and loose.labels.tolist() == [0]
    assert V.Folder(tmp_path, 4)[0][0].shape == (3, 4, 4)
    (tmp_path / "tree/cat").mkdir(parents=True)
    image(8, 12).save(tmp_path / "tree/cat/0.png")
    assert V.Folder(tmp_path / "tree").resolution == 256


def test_bad_folders(tmp_path):
    """Each mistake with a data folder is one line that names the folder or the file."""
    with pytest.raises(ValueError) as caught:
        V.open_images(str(tmp_path / "absent"), 32)
    one_line(caught, tmp_path / "absent", "--data=tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as caught:
        V.Folder(tmp_path / "empty", 32)
    one_line(caught, tmp_path / "empty", "no valid file", "expected images")
    (tmp_path / "data/cat").mkdir(parents=True)
    (tmp_path / "data/dog").mkdir()
    image(64, 64).save(tmp_path / "data/dog/0.png")
    with pytest.raises(ValueError) as caught:
        V.Folder(tmp_path / "data", 32)
    one_line(caught, tmp_path / "data", "no valid file", "cat", "expected images in each class folder")
    image(64, 64).save(tmp_path / "good.png")
    whole, path = (tmp_path / "good.png").read_bytes(), tmp_path / "data/cat/1.png"
    middle = len(whole) // 2
    for content in (b"", b"no image", whole[:100], whole[:middle], whole[:60] + b"??" + whole[62:]):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            V.Folder(tmp_path / "data", 32).read(0)
        one_line(caught, path, "repair or remove it")


class OneByOne:
    """A data set of one's own with data[i] alone."""
    classes, labels, resolution = ["a", "b"], [0, 1, 0], 4

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return torch.full((3, 4, 4), i, dtype=torch.uint8), self.labels[i]


@pytest.mark.parametrize("kind", ["folder", "shapes", "npz", "own"])
def test_data_sets(tmp_path, kind):
    """data[i], fetch and torch's DataLoader, with workers too, give the same images and labels;
    .labels, where it lists them, are these labels."""
    if kind == "folder":
        for i, name in enumerate(("cat", "dog", "cat")):
            (tmp_path / name).mkdir(exist_ok=True)
            image(9, 9, seed=i).save(tmp_path / name / f"{i}.png")
        data = V.Folder(tmp_path, 8)
    elif kind == "npz":
        pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / "x.npz", arr_0=pixels, arr_1=[1, 0, 1])
        data = V.open_images(str(tmp_path / "x.npz"))
    else:
        data = V.Shapes(8) if kind == "shapes" else OneByOne()
    images, labels = V.fetch(data, [2, 0, 1])
    assert images.dtype == torch.uint8 and images.shape == (3, 3, data.resolution, data.resolution)
    assert labels.dtype == torch.int64
    for i, image_i, label in zip([2, 0, 1], images, labels):
        assert torch.equal(data[i][0], image_i) and int(data[i][1]) == label
        assert kind == "shapes" or int(data.labels[i]) == label
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(data, batch_sampler=[[2, 0], [1]], num_workers=workers,
                                             collate_fn=V.collate)
        (first, first_labels), (last, last_labels) = loader
        assert torch.equal(torch.cat([first, last]), images)
        assert torch.equal(torch.cat([first_labels, last_labels]), labels)


def test_fingerprint():
    """Another class or label is other data; the number of the drawn shapes counts."""
    prints = [V.fingerprint(V.Shapes(32)), V.fingerprint(V.Shapes(32, length=40_000))]
    for classes, labels in ((["a", "b"], [0, 1]), (["a", "c"], [0, 1]), (["a", "b"], [1, 0])):
        pack = V.Pack(np.zeros((2, 8, 8, 3), np.uint8), np.array(labels), classes)
        prints.append(V.fingerprint(pack))
    assert len(set(prints)) == len(prints) and V.fingerprint(V.Shapes(32)) == prints[0]


def test_shapes():
    """Image i is a function of i alone, labels cover the ten classes, and the mask lies where the shape is."""
    data = V.Shapes(32)
    images, labels, masks = data.draw(range(1000))
    for indices in ([999], [3, 998, 0], range(17, 50)):
        alone, label = V.fetch(data, indices)
        assert torch.equal(alone, images[list(indices)]) and torch.equal(label, labels[list(indices)])
    assert torch.equal(V.Shapes(32, first=500)[7][0], images[507])
    assert images.dtype == torch.uint8 and len(images.flatten(1).unique(dim=0)) == 1000
    count = torch.bincount(labels, minlength=10)                    # standard deviation: 9.5
    assert len(count) == 10 and len(data.classes) == 10 and (count - 100).abs().max() < 40
    share = masks.mean((1, 2))
    assert masks.min() == 0 and masks.max() == 1 and 0.02 < share.min() and share.max() < 0.8
    _, labels, masks_fine = V.Shapes(128).draw(range(200))
    for label, mask in zip(labels, masks_fine):                     # the mask is the label's shape
        rows, columns = (mask.amax(axis) > 0.5 for axis in (1, 0))
        box = mask[rows][:, columns]
        centre = box[len(box) // 2, box.shape[1] // 2]
        if data.classes[label] in ("disc", "square", "plus"):
            assert centre == 1
        if data.classes[label] in ("ring", "frame"):
            assert centre == 0
        if data.classes[label] == "disc":
            assert abs(box.mean() - math.pi / 4) < 0.03
    colours = images.float() / 255                                  # inside and outside differ in some channel
    inside, outside = ((colours * m[:, None]).sum((2, 3)) / m.sum((1, 2))[:, None] for m in (masks == 1, masks == 0))
    assert ((inside - outside).abs().amax(1) > 0.15).float().mean() > 0.95

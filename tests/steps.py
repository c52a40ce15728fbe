"""What tests/bench.py and tests/gpu.py time: train.train_step on random weights, and the authors' step from a checkout."""
import copy
import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
from torch import nn

import train
from repa import TEACHERS, DINOv2, TinyTeacher
from sample import PUBLISHED, can_compile
from sit import SiT, SiTConfig
from vae import LPIPS, VAE, VAES, Discriminator


def random_teacher(cfg, grid):
    """A teacher of the true shape with random weights."""
    if cfg.teacher == "tiny":
        teacher = TinyTeacher().eval()
        teacher.grid = grid
        return teacher
    import timm
    size = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}[cfg.teacher.split("_")[1]]
    vit = timm.create_model(f"vit_{size}_patch14_dinov2", img_size=14 * grid, dynamic_img_size=False)
    net = DINOv2.__new__(DINOv2)
    nn.Module.__init__(net)
    net.grid, net.net = grid, vit
    vit.forward_features_of_timm = vit.forward_features
    vit.forward_features = lambda x: {"x_norm_patchtokens": vit.forward_features_of_timm(x)[:, 1:]}
    net.register_buffer("mean", torch.zeros(3, 1, 1))
    net.register_buffer("std", torch.ones(3, 1, 1))
    return net.eval()

def random_lpips(legacy_range):
    """LPIPS on a random VGG16."""
    import lpips
    net = LPIPS.__new__(LPIPS)
    nn.Module.__init__(net)
    net.net = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    net.legacy_range = legacy_range
    return net.eval()

class Ours:
    """The networks of a joint run with random weights of the true shapes, and train.train_step on them. fake: a mode in
    which tensors have shapes but no storage, for counting."""

    def __init__(self, cfg, device, fake=None):
        torch.manual_seed(0)
        depth, width, heads, patch, align_depth = train.architecture(cfg)
        self.cfg, self.device = replace(cfg, gan_start=0), device
        vae_config = VAES[PUBLISHED.get(cfg.vae, cfg.vae)]
        side = cfg.resolution // vae_config.downsampling
        self.latent = vae_config.z_channels, side, side
        teacher = random_teacher(cfg, side // patch).requires_grad_(False)      # timm needs real numbers to build it
        lpips = random_lpips(cfg.lpips_legacy_range).requires_grad_(False) if cfg.lpips else None
        with fake or nullcontext():
            vae, disc = VAE(vae_config), Discriminator(cfg.disc_ch)
            sit = SiT(SiTConfig(depth, width, heads, patch, vae_config.z_channels, side, 1000,
                                (TEACHERS[cfg.teacher].dim,), align_depth, cfg.projector_width))
            with torch.no_grad():                   # adaLN-Zero would hide the blocks from any comparison
                for p in [*sit.parameters(), *vae.parameters()]:
                    p.add_(0.02 * torch.randn_like(p))
        if not fake:
            for net in filter(None, (vae, sit, disc, teacher)):
                net.to(device, memory_format=torch.channels_last)
            if lpips:
                lpips.to(device)
        self.nets = train.Networks(vae, sit, disc, teacher, lpips)
        self.opts = {}
        if not fake:
            self.nets.ema = copy.deepcopy(sit).requires_grad_(False)
            self.opts = {name: train.make_optimizer(getattr(self.nets, name), 1e-4) for name in ("vae", "disc", "sit")}
        for level in [*vae.encoder.down[: cfg.recompute], *vae.decoder.up[: cfg.recompute]]:
            level.recompute = True
        if cfg.compile == "1" or (cfg.compile == "auto" and can_compile(device)):
            train.compile_networks(self.cfg, self.nets)

    def draws(self, n):
        return train.draws(self.cfg, n, 0, 1, self.latent, self.device)

    def step(self, image, y, r, part=None):
        """The joint step -> its terms by name. part(name): a context that is entered around each part."""
        with in_parts(self.nets, part, ("VAE backward", "discriminator", "SiT backward")) as nets:
            return train.train_step(self.cfg, nets, self.opts, iter([(image, y)]), r)[0]

    def frozen_step(self, moments, image, y, r, part=None):
        """The step of --method=repa with a cache of latents: SiT and alignment alone."""
        frozen = train.Networks(self.nets.vae, self.nets.sit, teacher=self.nets.teacher, ema=self.nets.ema)
        opts = {name: opt for name, opt in self.opts.items() if name == "sit"}
        with in_parts(frozen, part, ("SiT backward",)) as nets:
            return train.train_step(replace(self.cfg, method="repa"), nets, opts, iter([(image, y, moments)]), r)[0]


class Part:
    """A network whose calls are a part of the step; all else is the network's own."""

    def __init__(self, net, part, name):
        self.net, self.part, self.name = net, part, name

    def __call__(self, *args, **kwargs):
        with self.part(self.name):
            return self.net(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.net, name)


@contextmanager
def in_parts(nets, part, backwards):
    """-> the networks, with part(name) around their calls, the backward passes (their names in order) and the update.
    Between the parts lie only losses and interpolants."""
    if part is None:
        yield nets
        return
    order, backward, update = iter(backwards), torch.Tensor.backward, train.update

    def named_backward(loss):
        with part(next(order)):
            backward(loss)

    def named_update(*args):
        with part("clip, check, AdamW, EMA"):
            return update(*args)
    direct = {"teacher": "teacher", "lpips": "LPIPS, D on rec", "disc": "LPIPS, D on rec", "sit": "alignment pass"}
    trained = {"vae": "VAE forward", "disc": "discriminator", "sit": "SiT forward"}
    wrapped = {name: Part(getattr(nets, name), part, title) for name, title in direct.items()
               if getattr(nets, name) is not None}
    ddp = {name: Part(net, part, trained[name]) for name, net in nets.ddp.items()}
    with patch.object(torch.Tensor, "backward", named_backward), patch.object(train, "update", named_update):
        yield replace(nets, ddp=ddp, **wrapped)


class Peer:
    """train_repae.py's and train_ldm_only.py's step without their data and logging services, in their order, with their
    networks, loss module, optimizers, EMA and scalars read each step. accelerate's share is written out: nothing in
    float32, on a GPU fp16 autocast with one GradScaler. The teacher is the same one on both sides."""
    def __init__(self, checkout, ours):
        sys.path.insert(0, str(checkout))

        class Dict(dict):
            __getattr__ = dict.__getitem__
        for name in "accelerate accelerate.logging accelerate.utils omegaconf wandb dictdot einops dataset".split():
            sys.modules[name] = stub = MagicMock()          # what they import and the step does not use
            stub.dictdot = Dict                             # but this, a dict with attributes
        import loss.lpips as their_lpips
        import yaml
        from loss.discriminator import NLayerDiscriminator
        from loss.losses import ReconstructionLoss_Single_Stage
        from models import autoencoder
        from models.sit import SiT as TheirSiT
        import samplers
        import train_repae
        cfg, nets, device = ours.cfg, ours.nets, ours.device
        vae, sit = nets.vae.cfg, nets.sit.cfg
        self.cfg, self.device, self.teacher = cfg, device, nets.teacher
        self.samplers, self.script = samplers, train_repae
        shape = dict(ch=vae.ch, ch_mult=vae.ch_mult, num_res_blocks=vae.num_res_blocks, z_channels=vae.z_channels,
                     resolution=cfg.resolution // vae.patch, in_channels=3 * vae.patch**2, out_ch=3 * vae.patch**2,
                     attn_resolutions=(cfg.resolution // vae.downsampling,) if vae.attn_last else ())
        self.vae = autoencoder.AutoencoderKL(vae.z_channels, vae.ch_mult)
        self.vae.encoder, self.vae.decoder = autoencoder.Encoder(**shape), autoencoder.Decoder(**shape)
        self.vae.load_state_dict(nets.vae.state_dict())
        for module in self.vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = vae.groups
        if vae.patch > 1:                                       # `tiny`: the same shuffle around their networks
            self.vae.encoder = nn.Sequential(nn.PixelUnshuffle(vae.patch), self.vae.encoder)
            self.vae.decoder = nn.Sequential(self.vae.decoder, nn.PixelShuffle(vae.patch))
        self.sit = TheirSiT(input_size=sit.size, patch_size=sit.patch, in_channels=sit.channels, hidden_size=sit.width,
                            decoder_hidden_size=sit.width, encoder_depth=sit.align_depth, depth=sit.depth,
                            num_heads=sit.heads, class_dropout_prob=cfg.label_drop, num_classes=sit.num_classes,
                            z_dims=list(sit.teacher_dims), projector_dim=sit.projector_width, fused_attn=True,
                            qk_norm=False)
        self.sit.load_state_dict(nets.sit.state_dict())
        config = yaml.safe_load((Path(checkout) / "configs/l1_lpips_kl_gan.yaml").read_text())
        config["losses"] |= {"discriminator_weight": cfg.gan, "perceptual_weight": cfg.lpips, "kl_weight": cfg.kl}
        vgg16 = their_lpips.models.vgg16
        their_lpips.models.vgg16 = lambda weights: vgg16()
        their_lpips.LPIPS.load_pretrained = lambda self: None
        self.loss = ReconstructionLoss_Single_Stage(json.loads(json.dumps(config), object_hook=Dict))
        their_lpips.models.vgg16 = vgg16
        self.loss.discriminator = NLayerDiscriminator(ndf=cfg.disc_ch)
        self.loss.discriminator.load_state_dict(nets.disc.state_dict())
        if cfg.lpips:
            self.loss.perceptual_loss.lpips.load_state_dict(nets.lpips.net.state_dict(), strict=False)
        else:
            del self.loss.perceptual_loss
            self.loss.perceptual_loss = lambda x, rec: x.new_zeros(())
        self.nets = {"vae": self.vae.to(device), "disc": self.loss.to(device), "sit": self.sit.to(device)}
        self.ema = copy.deepcopy(self.sit).requires_grad_(False).eval()
        self.opts = {name: torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
                     for name, net in self.nets.items()}
        self.plain_sit, fp16 = self.sit, device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.autocast = lambda: torch.autocast(device.type, torch.float16, enabled=fp16)
        if cfg.compile == "1" or (cfg.compile == "auto" and fp16):
            torch._dynamo.config.cache_size_limit, torch._dynamo.config.accumulated_cache_size_limit = 64, 512
            self.sit, self.vae, self.loss = (torch.compile(net) for net in (self.sit, self.vae, self.loss))

    def apply(self, loss, name):
        """backward, clip, step: what accelerate makes of them."""
        self.scaler.scale(loss).backward()
        for opt in self.opts.values() if self.scaler.is_enabled() else ():
            if any(p.grad is not None for group in opt.param_groups for p in group["params"]):
                self.scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(self.nets[name].parameters(), 1.0)
        self.scaler.step(self.opts[name])
        self.scaler.update()
        self.opts[name].zero_grad(set_to_none=True)
        return norm

    def features(self, image):
        with torch.no_grad(), self.autocast():
            return [self.teacher(image)]

    def step(self, image, y, _=None):
        cfg, f = self.cfg, self.features(image)
        self.vae.train()
        self.sit.train()
        with self.autocast():
            x = self.script.preprocess_imgs_vae(image)
            posterior, z, rec = self.vae(x)
            z, rec = z.float(), rec.float()
            how = dict(path_type=cfg.path, prediction="v", weighting=cfg.weighting, align_only=True)
            self.script.requires_grad(self.sit, False)
            self.sit.eval()
            vae_loss, log = self.loss(x, rec, posterior, 0, "generator")
            align = self.sit(x=z, y=y, zs=f, loss_kwargs=how, time_input=None, noises=None)
            vae_loss = vae_loss.mean() + cfg.align_vae * align["proj_loss"].mean()
            norm_vae = self.apply(vae_loss, "vae")
            d_loss, d_log = self.loss(x, rec, posterior, 0, "discriminator")
            norm_disc = self.apply(d_loss.mean(), "disc")
            self.script.requires_grad(self.sit, True)
            self.sit.train()
            how = how | {"align_only": False}
            now = self.diffusion(z.detach(), y, f, how, align["time_input"], align["noises"])
        scalars = {"l1": log["reconstruction_loss"], "kl": log["kl_loss"] / cfg.kl, "gan": log["gan_loss"],
                   "lpips": log["perceptual_loss"] / (cfg.lpips or 1), "align_vae": align["proj_loss"], "disc": d_loss,
                   "norm_vae": norm_vae, "norm_disc": norm_disc}
        logged = [vae_loss, d_log["logits_real"], d_log["logits_fake"], d_log["lecam_loss"]]
        logged += [log[name] for name in ("discriminator_factor", "weighted_gan_loss", "d_weight")]
        for value in logged:                                    # read each step, as in theirs
            value.mean().detach().item()
        return now | {name: value.mean().detach().item() for name, value in scalars.items()}

    def frozen_step(self, moments, image, y, _=None):
        f = self.features(image)
        with self.autocast():
            self.sit.train()
            self.plain_sit.bn.eval()
            mean, std = moments.flatten(1, 2).float().chunk(2, dim=1)
            how = dict(path_type=self.cfg.path, prediction="v", weighting=self.cfg.weighting, align_only=False)
            return self.diffusion(mean + std * torch.randn_like(mean), y, f, how, None, None)

    def diffusion(self, z, y, f, how, t, eps):
        out = self.sit(x=z, y=y, zs=f, loss_kwargs=how, time_input=t, noises=eps)
        loss = out["denoising_loss"].mean() + self.cfg.align_sit * out["proj_loss"].mean()
        norm = self.apply(loss, "sit")
        self.script.update_ema(self.ema, self.plain_sit)
        scalars = {"sit": loss, "v": out["denoising_loss"], "align_sit": out["proj_loss"], "norm_sit": norm}
        return {name: value.mean().detach().item() for name, value in scalars.items()}

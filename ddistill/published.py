"""Teachers that are published: their networks, processes and data, for experiments and dry runs without their weights.

Latents are those of the pipelines' autoencoders; prompts are as `ddistill encode` stores them.
"""

from collections.abc import Mapping

from ddistill.config import Published
from ddistill.net import EDMPrecondition, EpsPrecondition, VelocityPrecondition
from ddistill.networks.dit import DiTConfig
from ddistill.networks.edm import DhariwalUNetConfig, SongUNetConfig
from ddistill.networks.flux import FluxConfig
from ddistill.networks.sd3 import SD3Config
from ddistill.networks.unet import UNet2DConditionConfig
from ddistill.process import Process, discrete_vp, edm, flow, linear_betas, scaled_linear_betas

_EPS = EpsPrecondition(time_offset=-1.0)


def edm_cifar10(classes: bool = True) -> Published:
    """EDM's DDPM++ on CIFAR-10, "vp" with preconditioning "edm" (Karras et al. 2022, app. F.2): 55.7 M parameters."""
    labels = 10 if classes else 0
    config = SongUNetConfig(32, label_dim=labels, augment_dim=9, channel_mult=(2, 2, 2), dropout=0.13)
    return Published(config, edm(), EDMPrecondition(), (32, 32, 3), labels)


def edm_imagenet64() -> Published:
    """EDM's ADM on ImageNet at 64 × 64, edm-imagenet-64x64-cond-adm (Karras et al. 2022, app. F.2): 295.9 M."""
    config = DhariwalUNetConfig(64, label_dim=1000)
    return Published(config, edm(), EDMPrecondition(), (64, 64, 3), 1000)


def dit_xl_2(side: int = 32) -> Published:
    """DiT-XL/2 on ImageNet's latents, side 32 for 256 × 256 pixels (Peebles & Xie 2022), in diffusers' form."""
    config = DiTConfig(out_channels=8, sample_size=side)
    return Published(config, discrete_vp(linear_betas().tolist()), _EPS, (side, side, 4), 1000)


def sit_xl_2(side: int = 32) -> Published:
    """SiT-XL/2 on ImageNet's latents (Ma et al. 2024), 674,834,720 parameters, as `ddistill import` has its release."""
    config = DiTConfig(out_channels=8, sample_size=side, norm_eps=1e-6, freq_shift=0.0, shared_embedding=True)
    return Published(config, flow(), VelocityPrecondition(), (side, side, 4), 1000)


def sd15(side: int = 64) -> Published:
    """Stable Diffusion 1.5, side 64 for 512 × 512 pixels (Rombach et al. 2022): 859,520,964 parameters."""
    config = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)
    return _text(config, _stable_diffusion(), (side, side, 4), {"states": (77, 768)})


def sdxl(side: int = 128) -> Published:
    """SDXL base 1.0, side 128 for 1024 × 1024 pixels (Podell et al. 2023): 2,567,463,684 parameters."""
    config = UNet2DConditionConfig(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    prompt = {"states": (77, 2048), "pooled": (1280,), "sizes": (6,)}
    return _text(config, _stable_diffusion(), (side, side, 4), prompt)


def sd3_medium(side: int = 128) -> Published:
    """Stable Diffusion 3 medium, side 128 for 1024 × 1024 pixels (Esser et al. 2024): 2,028,328,000 parameters."""
    config = SD3Config(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
    # 77 tokens of CLIP, then 256 of T5.
    return _text(config, flow(), (side, side, 16), {"states": (333, 4096), "pooled": (2048,)})


def flux_dev(side: int = 128) -> Published:
    """FLUX.1 dev, side 128 for 1024 × 1024 pixels (Black Forest Labs 2024): 11,901,408,320 parameters."""
    prompt = {"states": (512, 4096), "pooled": (768,)}
    return Published(
        FluxConfig(guidance_embeds=True), flow(), VelocityPrecondition(1.0), (side, side, 16), prompt=prompt
    )


def _stable_diffusion() -> Process:
    return discrete_vp(scaled_linear_betas().tolist())


def _text(config, process: Process, shape: tuple[int, ...], prompt: Mapping[str, tuple[int, ...]]) -> Published:
    precondition = VelocityPrecondition(1000.0) if process == flow() else _EPS
    return Published(config, process, precondition, shape, prompt=prompt)

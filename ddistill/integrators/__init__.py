"""Integrators of the probability-flow ODE and the reverse SDE: pure functions from a denoiser and a grid to samples."""

from ddistill.integrators.multistep import ancestral, ddim, ddpm, deis, dpmpp_2m, dpmpp_3m, sde_dpmpp_2m, unip, unipc
from ddistill.integrators.scan import Denoise, Solution
from ddistill.integrators.single_step import dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_3s, euler, heun, rk4
from ddistill.integrators.stochastic import euler_maruyama, heun_churn, predictor_corrector, reverse_diffusion

__all__ = [
    "Denoise",
    "Solution",
    "ancestral",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver_2",
    "dpm_solver_3",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3s",
    "euler",
    "euler_maruyama",
    "heun",
    "heun_churn",
    "predictor_corrector",
    "reverse_diffusion",
    "rk4",
    "sde_dpmpp_2m",
    "unip",
    "unipc",
]

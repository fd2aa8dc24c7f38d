"""MoDE: a diffusion transformer with a mixture of denoising experts, from camera images and an instruction."""

"""What every diffusion policy shares: noise schedules, samplers, preconditioning, training noise."""

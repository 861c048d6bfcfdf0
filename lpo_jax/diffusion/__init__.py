"""Pure mathematics of the diffusion: schedules, noising, samplers."""

"""DiVLA: a vision-language model that reasons in words, and a diffusion head that its reasoning is injected into."""

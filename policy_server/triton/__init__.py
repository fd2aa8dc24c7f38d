"""What runs inside a Triton server, and what starts one on a machine without NVIDIA's container."""

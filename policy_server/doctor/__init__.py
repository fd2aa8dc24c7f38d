"""What is right and wrong with the machine that policies are to be served on, and what to do about it."""

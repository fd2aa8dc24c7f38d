"""The mathematics of the policies: what each one is, apart from how it is served."""

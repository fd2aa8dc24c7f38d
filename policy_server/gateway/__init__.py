"""The doors: every protocol that robots and people reach the policies by."""

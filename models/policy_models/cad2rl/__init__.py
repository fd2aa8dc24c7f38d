"""CAD2RL: collision avoidance from one image, trained in randomised simulation alone (Sadeghi and Levine 2017)."""

"""What `reroll` is made of: steps of an unrolled loop, what their numbers are as functions of it, one step for all."""

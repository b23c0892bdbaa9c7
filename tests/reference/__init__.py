"""Textbook oracles: each optimizer in plain torch, whole tensors, one process, in whatever dtype the parameters have.

They share no code with ds_optim or with one another, so that a mistake cannot hide in a common helper. All have the
form

    optimizer(params, grads, state, t, *, lr, ..., weight_decay)

where `params` and `grads` map names to tensors of equal shapes, `state` is an empty dictionary before the first step,
`t` is the number of the step from 1, and `weight_decay` is one number or one per name. `params` and `state` are updated
by putting new tensors in place of the old; tensors are never written to. Give fp64 parameters (and gradients) for the
exact result. A parameter that was not used in a step is given a gradient of zeros.
"""

"""All that knows DeepSpeed's classes, attributes and versions; nothing outside this package imports DeepSpeed.

    plugin            a name in a JSON becomes one of our optimizers, bound to its engine
    parameters        what DeepSpeed makes optimizers of
    names             what may stand in a JSON, and where DeepSpeed looks it up
    configuration     the JSON's options: what is wrong, and what trains with other numbers than it seems to
    refusals          what cannot be exact, or cannot be trained
    reader            who holds which elements, read out of an engine; access to state
    gradient_window   a step's gradient is what arrived since the last step
    events            where that can be seen
    guards            where DeepSpeed says nothing
    overlooked        an optimizer that was given and is not the one that trains
    engine_state      what of an engine a checkpoint needs beside tensors
    checkpoint_files  the directory that ``save_checkpoint`` writes
    predict           layouts of a training that has not begun
    wrappers          the one table of what is read of DeepSpeed's objects
    differences       what is not the same in all releases that work
    facts             numbers and names that stand in DeepSpeed's source

Only the plugin needs DeepSpeed to be imported; elsewhere it is imported inside the functions that ask it something, so
that memory is accounted for and checkpoints are read where it is not installed.
"""

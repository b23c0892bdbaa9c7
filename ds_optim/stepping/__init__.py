"""Where a rule meets a layout: the steps of every kind of rule, and what they keep, under any strategy."""

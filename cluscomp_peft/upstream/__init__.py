"""The names of peft, transformers, accelerate, deepspeed and torch that they do not document and this package touches.

One file for each library, one function or constant for each name. Its docstring says what of theirs is touched and
what breaks here if it changes. `tests/upstream` holds each to a contract test, which fails with that docstring, and
sees to it that no other file of the package touches such a name.

Nothing here imports the rest of the package. peft and the models of transformers, which take seconds to import, are
imported inside the functions.
"""

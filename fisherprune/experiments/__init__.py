"""Studies: many runs from files, none lost, none done twice.

``python -m fisherprune.experiments --help`` on the command line. In the order of the
flow: ``published`` and ``study`` (the two formats, both end in a TrainConfig), ``plan``
(paths -> runs), ``shard`` (the part of them that is done here), ``store`` (a results
folder), ``execute`` (one run, under its lock), ``executors`` (where runs are executed),
``estimate`` (how long they take), ``batch`` (all of them).
"""

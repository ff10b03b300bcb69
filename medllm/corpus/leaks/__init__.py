"""Held-out exam problems in training text: word for word, nearly so, and by where a set was made from.

``pieces`` folds a text and cuts it, ``near`` looks for problems by the pieces that are theirs alone, ``search`` does so beside
:mod:`medllm.corpus.contamination`'s exact containment, ``derivations`` is the table of sets made from exams, ``guard`` refuses
what any of them finds. ``changes`` plants copies that are changed to a degree, so that what is found can be measured.
"""

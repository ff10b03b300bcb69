"""Held-out exam problems in training text: word for word, nearly so, and by where a set was made from.

``exact`` looks for a problem's own words, ``pieces`` folds a text and cuts it, ``near`` looks for problems by the pieces that
are theirs alone, ``search`` does both in one reading, ``derivations`` is the table of sets made from exams, ``guard`` refuses
what any of them finds. ``changes`` plants copies that are changed to a degree, so that what is found can be measured.
"""

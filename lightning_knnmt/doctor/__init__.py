"""Checks whether a model, a text and a datastore fit together, and explains what it finds.

Most mistakes in kNN-MT raise no error: text tokenised in another way, swapped languages, keys of
another layer or other weights, a temperature chosen for another datastore. They only lower the
score. Each check looks for one of them and returns a `checks.Finding`; `lightning-knnmt doctor`
prints them.
"""

__all__: list[str] = []

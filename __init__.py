"""routesae: sparse autoencoders over the middle layers of language models, the model paid for once.

The rooms, in the order the data flows; imports only ever point upstream:

    cli → analyze → train → harvest

Importing this package imports none of them.
"""

__version__ = "0.1.0"

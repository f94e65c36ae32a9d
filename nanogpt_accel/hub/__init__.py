"""Use the Hugging Face Hub: download, upload, push in the background, write model cards.

In: a model folder or a Hub id. Out: a commit on the Hub, or a local folder.
To change the contents of model cards, edit card.py.
"""

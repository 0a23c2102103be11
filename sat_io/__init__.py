"""What goes into training and what comes out of it: files to a corpus, a trained model to whoever uses it.

`sat_core` trains; it reads a corpus and leaves a model, and knows nothing of rows, formats or exports. What looks at rows
without a tokenizer (`rows`, `parsing`, `streams`, `formats`) and at exports without a model (`portable`) needs the standard library
alone, so the web service uses it too.
"""

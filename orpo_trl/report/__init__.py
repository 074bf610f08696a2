"""`orpo-trl report`: what runs left on disk as one page, as pictures and as a table. Needs neither torch nor a GPU."""

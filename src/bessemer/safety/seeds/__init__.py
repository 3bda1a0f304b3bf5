"""Seeds of the guard's classifier: what is asked, how it is put, and what sounds alike and is harmless."""

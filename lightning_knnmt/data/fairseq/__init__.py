"""fairseq's text formats: dictionaries, BPE codes and binarised corpora, read in place."""

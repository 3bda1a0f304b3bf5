"""Several models or adapters made one, without training: `methods` are functions of tensors, `models` and `adapters` apply them
to folders tensor by tensor, `config` holds the settings of the stage `merge` and reads mergekit's files."""

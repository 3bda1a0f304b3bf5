"""`bessemer finetune`: somebody's model, somebody's table of questions and answers, one command."""

class Seen:
    def __init__(self, prompt_ids):
        pass

    def add(self, token_id):
        pass

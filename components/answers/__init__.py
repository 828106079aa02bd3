from components.answers.component import answers as answers

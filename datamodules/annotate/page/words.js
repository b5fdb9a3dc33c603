// What the page says, in English and Korean.

const WORDS = {
  en: {
    question: "Question", conversation: "Conversation", system: "system", user: "person", assistant: "model", tool: "tool",
    answers: "Answers", answer: "Answer {0}", drag: "Drag into the ranking", rank: "Rank of answer {0}", rankNth: "{0}",
    ranking: "Ranking", best: "best", worst: "worst", tray: "not ranked yet", tie: "same rank",
    dropHere: "drag letters here",
    reason: "Why? (if you like)", reasonHint: "What makes the best one better?",
    allBad: "All bad", skip: "Skip", undo: "Undo", submit: "Next", save: "Save", more: "Show all", less: "Show less",
    plain: "Plain text", formatted: "Formatted", copy: "Copy",
    of: "{0} of {1}", skippedToo: "{0} skipped", done: "That was all. Thank you!",
    doneMore: "You ranked {0} of {1} items, and skipped {2}.", goBack: "Change your last vote", askSkipped: "Look at skipped ones again",
    empty: "(this answer is empty)", ranked: "{0}: rank {1}", unranked: "{0}: no rank", rankFirst: "Give each answer a rank first.",
    earlier: "You are changing an earlier vote.", leave: "Leave it as it was", again: "You skipped this before.",
    nothingToUndo: "There is nothing to undo.", waiting: "Not sent yet; it stays on this page and is sent again. ({0})",
    sent: "Sent.", offline: "no connection", gone: "That item is no longer there, so your vote was not counted.",
    refused: "The vote was not taken: {0}", full: "the disk of the server is full", store: "the server cannot store it now", often: "too many requests",
    token: "This link is not valid here. Ask for your own link, and open that.", host: "Open the page by the link that was given to you.",
    noItem: "Loading …", keysTitle: "Keys", close: "Close", expand: "Show the whole text",
    hello: "Say something. Several answers will come, in an order that says nothing of who wrote them.",
    askHint: "Your message", send: "Send", anew: "New conversation", busy: "The models are still answering.",
    allSame: "There was one answer only, so it goes on without a vote.", allFailed: "No model answered. Your message is still there; try again.",
    oneFailed: "This answer failed. The others go on.", takenBack: "Your question was taken back; ask something else, or the same again.",
    keys: [["1 – 9", "rank of the answer in focus; equal numbers are a tie"], ["0", "take its rank away"], ["A – H", "go to the answer with this letter"],
      ["← →", "another answer"], ["Enter", "next item"], ["X", "all bad"], ["S", "skip"], ["Z", "undo; then your last vote"],
      ["R", "write a reason (Esc leaves it)"], ["O", "unfold and fold"], ["T", "plain text, formatted"], ["?", "these keys"]],
  },
  ko: {
    question: "질문", conversation: "대화", system: "시스템", user: "사람", assistant: "모델", tool: "도구",
    answers: "답변", answer: "답변 {0}", drag: "순위로 끌어다 놓기", rank: "답변 {0}의 순위", rankNth: "{0}",
    ranking: "순위", best: "좋음", worst: "나쁨", tray: "아직 순위 없음", tie: "동순위",
    dropHere: "여기로 끌어다 놓기",
    reason: "이유 (선택)", reasonHint: "가장 좋은 답변은 무엇이 나은가요?",
    allBad: "모두 나쁨", skip: "건너뛰기", undo: "되돌리기", submit: "다음", save: "저장", more: "모두 보기", less: "접기",
    plain: "원문", formatted: "서식", copy: "복사",
    of: "{1}개 중 {0}개", skippedToo: "건너뜀 {0}", done: "모두 마쳤습니다. 감사합니다!",
    doneMore: "{1}개 중 {0}개의 순위를 매기고 {2}개를 건너뛰었습니다.", goBack: "마지막 투표 고치기", askSkipped: "건너뛴 항목 다시 보기",
    empty: "(빈 답변)", ranked: "{0}: {1}위", unranked: "{0}: 순위 없음", rankFirst: "먼저 모든 답변에 순위를 매겨 주세요.",
    earlier: "이전 투표를 고치는 중입니다.", leave: "그대로 두기", again: "전에 건너뛴 항목입니다.",
    nothingToUndo: "되돌릴 것이 없습니다.", waiting: "아직 보내지 못했습니다. 이 페이지에 보관하고 다시 보냅니다. ({0})",
    sent: "보냈습니다.", offline: "연결 없음", gone: "이 항목이 더 이상 없어 투표가 반영되지 않았습니다.",
    refused: "투표가 받아들여지지 않았습니다: {0}", full: "서버의 디스크가 가득 참", store: "서버가 지금 저장할 수 없음", often: "요청이 너무 많음",
    token: "이 링크는 여기서 유효하지 않습니다. 본인의 링크를 받아서 여세요.", host: "받은 링크로 페이지를 여세요.",
    noItem: "불러오는 중 …", keysTitle: "단축키", close: "닫기", expand: "전체 글 보기",
    hello: "말을 걸어 보세요. 답변이 여러 개 나오며, 순서로는 누가 썼는지 알 수 없습니다.",
    askHint: "메시지", send: "보내기", anew: "새 대화", busy: "모델이 아직 답하는 중입니다.",
    allSame: "답변이 하나뿐이어서 투표 없이 이어집니다.", allFailed: "답한 모델이 없습니다. 메시지는 그대로 있으니 다시 보내 보세요.",
    oneFailed: "이 답변은 실패했습니다. 나머지는 계속됩니다.", takenBack: "질문을 되돌렸습니다. 다른 질문이나 같은 질문을 다시 해 보세요.",
    keys: [["1 – 9", "선택한 답변의 순위. 같은 숫자는 동순위"], ["0", "순위 지우기"], ["A – H", "이 글자의 답변으로"],
      ["← →", "옆 답변으로"], ["Enter", "다음 항목"], ["X", "모두 나쁨"], ["S", "건너뛰기"], ["Z", "되돌리기, 그다음에는 마지막 투표"],
      ["R", "이유 쓰기 (Esc로 나가기)"], ["O", "펼치기와 접기"], ["T", "원문과 서식"], ["?", "이 도움말"]],
  },
};

let language = localStorage.getItem("leyden-language") || (navigator.languages ?? []).map((name) => name.slice(0, 2)).find((name) => name in WORDS) || "en";

export const current = () => language;

export function choose(name) {
  language = name in WORDS ? name : "en";
  localStorage.setItem("leyden-language", language);
  document.documentElement.lang = language;
}

export function say(name, ...values) {
  const text = WORDS[language][name] ?? WORDS.en[name] ?? name;
  return typeof text === "string" ? text.replace(/\{(\d)\}/g, (_, place) => values[place] ?? "") : text;
}

// The words of the page, in its two languages.
//
// Exports `word(key, value)`, which everything that is read on the page goes through;
// `useLanguage(name)`; and what it sets: `language` ("en" or "fr") and `locale`, the
// reader's own kind of it ("fr-CA"), by which numbers and dates are written.

// "#" stands for a value. Of two texts, the first is for one thing, the second for many.
const WORDS = {
  en: {
    device: "device",
    all: "all devices",
    period: "period",
    from: "from",
    to: "to",
    floor: "running above",
    days: "# d",
    week: "week",
    month: "month",
    year: "year",
    earlier: "earlier",
    later: "later",
    last: ["last 24 hours", "last # days"],
    thisPeriod: "this period",
    before_day: "the day before",
    before_week: "the week before",
    before_other: "the time before",
    on: "on #",
    colon: "#:",

    isRunning: "running",
    isOff: "off",
    running: "running for #",
    runningMore: "running for more than #",
    off: "off since #",
    offMore: "off for more than #",
    silent: "no data since #",
    phases: "sum of # phases",
    today: "today",
    yesterday: "yesterday",
    atClock: "#",
    onDay: "#",
    runCount: ["# run", "# runs"],
    share: "# % of minutes",
    since: "since #",
    givenBack: "# given back",

    hint: "drag to zoom",
    whole: "whole period",
    zoom: "zoom",
    chart: "power over time. Left and right: values. Plus and minus: zoom. Escape: back.",
    mean: "mean",
    maximum: "maximum",
    run: "run",
    noData: "no data for #",
    offKept: "off (rows are kept only while it runs)",
    values: "values as a table",
    time: "time",
    day: "day",

    perDay: "energy per day",
    perMonth: "energy per month",
    others: "# others",
    wholeDays: "whole days",
    wholeMonths: "whole months",
    total: "total",
    noRows: "no rows in this period",

    runs: "runs",
    channel: "channel",
    start: "start",
    end: "end",
    duration: "duration",
    kWh: "kWh",
    cost: "cost",
    meanW: "mean W",
    maxW: "max W",
    A: "A",
    V: "V",
    ongoing: "still running",
    began: "began earlier",
    goesOn: "goes on later",
    noRuns: "no runs in this period",
    runsOfOne: "choose a device to see its runs",
    runsOfDays: "runs are shown for # days at most",
    showAll: "show all #",
    excel: "CSV for a French Excel",

    missing: "what is missing",
    missingNote: "between first and last row",
    noGaps: "nothing is missing",
    hasGap: "minutes are missing",
    reset: "counter reset",
    allChannels: "all channels",
    channelCount: ["# channel", "# channels"],
    first_row: "first row",
    last_row: "last row",
    rows: "rows",
    missing_minutes: "missing minutes",
    missing_rows: "missing rows",
    longest_gap: "longest gap",
    resets: "counter resets",

    empty: "no rows yet: paste this into your Shelly, then reboot it",
    emptyCheck:
      "no rows yet: paste the URL that shelly_collector.py --check shows into your Shelly, then reboot it",
    emptyWhere: "On the Shelly's own page: Settings → Connectivity → Outbound WebSocket",
    wasHere: "# was here:",
    refused_path: "the URL lacks /ws",
    refused_otherPath: "the URL has # instead of /ws",
    refused_token: "the URL lacks the right ?token=",
    refused_tls: "it speaks wss://, but the URL must begin with ws://",
    refused_site: "a page of another site may not send rows",
    copy: "copy",

    outOf: "of",
    send: "# send",
    areSilent: "# silent",
    away: "the database is away, rows are kept and will follow",
    waiting: ["# row waiting", "# rows waiting"],
    dropped: ["# row dropped", "# rows dropped"],
    noAnswer: "the collector does not answer",
    busy: "the answer is late, asking again …",
    shown: "shown is what came at #",
    token:
      "This link lacks the right token. The collector's owner finds the right link with shelly_collector.py --check.",
    order: "the start must be before the end",
  },
  fr: {
    device: "appareil",
    all: "tous les appareils",
    period: "période",
    from: "de",
    to: "à",
    floor: "en marche au-dessus de",
    days: "# j",
    week: "semaine",
    month: "mois",
    year: "année",
    earlier: "avant",
    later: "après",
    last: ["24 dernières heures", "# derniers jours"],
    thisPeriod: "cette période",
    before_day: "la veille",
    before_week: "la semaine d'avant",
    before_other: "la période d'avant",
    on: "par rapport à #",
    colon: "#\u00a0:",

    isRunning: "en marche",
    isOff: "arrêté",
    running: "en marche depuis #",
    runningMore: "en marche depuis plus de #",
    off: "arrêté #",
    offMore: "arrêté depuis plus de #",
    silent: "plus de données après #",
    phases: "somme de # phases",
    today: "aujourd'hui",
    yesterday: "hier",
    atClock: "à #",
    onDay: "le #",
    runCount: ["# cycle", "# cycles"],
    share: "# % des minutes",
    since: "depuis #",
    givenBack: "# rendus",

    hint: "glisser pour zoomer",
    whole: "toute la période",
    zoom: "zoom",
    chart:
      "puissance dans le temps. Gauche et droite : valeurs. Plus et moins : zoom. Échap : retour.",
    mean: "moyenne",
    maximum: "maximum",
    run: "cycle",
    noData: "pas de données pendant #",
    offKept: "arrêté (mesures gardées seulement en marche)",
    values: "valeurs en tableau",
    time: "heure",
    day: "jour",

    perDay: "énergie par jour",
    perMonth: "énergie par mois",
    others: "# autres",
    wholeDays: "jours entiers",
    wholeMonths: "mois entiers",
    total: "total",
    noRows: "pas de mesures dans cette période",

    runs: "cycles",
    channel: "voie",
    start: "début",
    end: "fin",
    duration: "durée",
    kWh: "kWh",
    cost: "coût",
    meanW: "W moyen",
    maxW: "W max",
    A: "A",
    V: "V",
    ongoing: "en cours",
    began: "commencé avant",
    goesOn: "continue après",
    noRuns: "pas de cycles dans cette période",
    runsOfOne: "choisissez un appareil pour voir ses cycles",
    runsOfDays: "les cycles sont montrés pour # jours au plus",
    showAll: "afficher les #",
    excel: "CSV pour Excel en français",

    missing: "ce qui manque",
    missingNote: "entre la première et la dernière mesure",
    noGaps: "rien ne manque",
    hasGap: "il manque des minutes",
    reset: "compteur remis à zéro",
    allChannels: "toutes les voies",
    channelCount: ["# voie", "# voies"],
    first_row: "première mesure",
    last_row: "dernière mesure",
    rows: "mesures",
    missing_minutes: "minutes manquantes",
    missing_rows: "mesures manquantes",
    longest_gap: "plus long trou",
    resets: "remises à zéro",

    empty: "pas encore de mesures : copiez ceci dans votre Shelly, puis redémarrez-le",
    emptyCheck:
      "pas encore de mesures : copiez dans votre Shelly l'adresse qu'affiche shelly_collector.py --check, puis redémarrez-le",
    emptyWhere: "Sur la page du Shelly : Settings → Connectivity → Outbound WebSocket",
    wasHere: "# s'est présenté :",
    refused_path: "il manque /ws dans l'adresse",
    refused_otherPath: "l'adresse contient # au lieu de /ws",
    refused_token: "il manque le bon ?token= dans l'adresse",
    refused_tls: "il parle wss://, mais l'adresse doit commencer par ws://",
    refused_site: "une page d'un autre site ne peut pas envoyer de mesures",
    copy: "copier",

    outOf: "sur",
    send: "# envoient",
    areSilent: "# sans données",
    away: "la base de données est absente, les mesures sont gardées et suivront",
    waiting: ["# mesure en attente", "# mesures en attente"],
    dropped: ["# mesure perdue", "# mesures perdues"],
    noAnswer: "le collecteur ne répond pas",
    busy: "la réponse tarde, nouvel essai …",
    shown: "affiché : l'état de #",
    token:
      "Ce lien n'a pas le bon jeton. Le propriétaire du collecteur trouve le bon lien avec shelly_collector.py --check.",
    order: "le début doit être avant la fin",
  },
};

const LOCALES = { en: "en-GB", fr: "fr-FR" };

export let language = "en";
export let locale = LOCALES.en;
let numbers = new Intl.NumberFormat(locale);

export function isLanguage(name) {
  return Object.hasOwn(WORDS, name);
}

export function useLanguage(name) {
  language = name;
  locale = LOCALES[name];
  for (const preferred of navigator.languages) {
    if (preferred.toLowerCase().startsWith(name)) {
      locale = preferred;
      break;
    }
  }
  numbers = new Intl.NumberFormat(locale, { maximumFractionDigits: 1 });
}

// French says "0 cycle" and "1,5 cycle"; English has only one thing that is one.
function isOne(value) {
  if (language === "fr") return value < 2;
  return value === 1;
}

// The text for a key; a value, if there is one, takes the place of "#".
export function word(key, value) {
  let text = WORDS[language][key];
  if (Array.isArray(text)) {
    text = isOne(value) ? text[0] : text[1];
  }
  if (value === undefined) return text;
  const written = typeof value === "number" ? numbers.format(value) : value;
  // A function, as "$&" in a value would mean something to replace().
  return text.replace("#", () => written);
}

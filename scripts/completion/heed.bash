# bash completion of heed(1). Options come from `heed COMMAND --help`, mechanisms and their parameters from
# `heed list --json`, both asked at completion time, so this file does not age.

# Prints every mechanism as NAME and each of its parameters as NAME:PARAMETER=.
_heed_mechanisms() {
  # Between quotes stand strings, elsewhere structure: every second record is a string.
  "$1" list --json 2> /dev/null | sed 's/\\"//g' | awk 'BEGIN { RS = "\"" }
    NR % 2 == 0 { text = $0; next }
    {
      if ($0 ~ /^[[:space:]]*:/) {
        key = text
        if ($0 ~ /\[/ && depth == level) list = text  # an array of the mechanism itself
      } else if (key != "") {
        if (key == "name") {
          if (level == 0) level = depth
          if (depth == level) { mechanism = text; print text }
          else if (list == "params") print mechanism ":" text "="
        }
        key = ""
      }
      depth += gsub(/{/, "") - gsub(/}/, "")
    }'
}

_heed() {
  local line=${COMP_LINE:0:COMP_POINT} commands='list explain attend plan run compare calibrate train lab tokenize inspect bench'
  local current=${line##*[[:space:]]} command= previous= word words=() choices=
  # Words as the user sees them: bash's own also break at : and =.
  read -r -a words <<< "${line%"$current"}"
  for word in "${words[@]:1}"; do
    [[ -z $command && " $commands " == *" $word "* ]] && command=$word
  done
  ((${#words[@]} > 1)) && previous=${words[-1]}

  case $previous in
    -m | --mechanism)
      if [[ $current == *:* ]]; then
        # Each parameter after the colon or a comma: NAME:given,PARAMETER=
        local name=${current%%:*} given=${current#*:}
        if [[ $given == *,* ]]; then given=${given%,*}, ; else given= ; fi
        choices=$(_heed_mechanisms "$1" | sed -n "s/^$name:/$name:$given/p")
      else
        choices=$(_heed_mechanisms "$1" | grep -v :)
      fi
      ;;
    explain) choices=$(_heed_mechanisms "$1" | grep -v :) ;;
    bench) choices='peak attend backward linear prefill decode' ;;
    lab) choices='gate moba moba-continued' ;;
    --dtype) choices='f32 bf16' ;;
    --kv | --kv-type) choices='f32 bf16 q8_0' ;;
    --phase) choices='prefill decode both' ;;
    --color) choices='auto always never' ;;
    --chat) choices='auto off' ;;
    --against) [[ $line =~ " bench "(attend|backward|linear)" " ]] && choices=torch || choices='llama.cpp openvino' ;;
    --optimizer) choices='adamw muon' ;;
    --task) choices='perplexity passkey copy perplexity,passkey perplexity,passkey,copy' ;;
    *)
      if [[ $current == -* ]]; then
        choices=$("$1" $command --help 2> /dev/null | grep -E '^ *-' | grep -oE -- '(^|[ ,])--[a-z][a-z-]*' |
          tr -d ' ,' | sort -u)
      elif [[ -z $command ]]; then
        choices=$commands
      fi
      ;;
  esac

  COMPREPLY=()
  while IFS= read -r word; do
    [[ -n $word && $word == "$current"* ]] && COMPREPLY+=("$word")
  done <<< "${choices// /$'\n'}"
  # A parameter awaits its value, and a name may be followed by parameters.
  [[ ${COMPREPLY[*]} == *= ]] && compopt -o nospace 2> /dev/null
  # Readline replaces only what follows the last : or =.
  local kept=${current%"${current##*[:=]}"}
  [[ -n $kept ]] && COMPREPLY=("${COMPREPLY[@]#"$kept"}")
  return 0
}

complete -o default -F _heed heed
